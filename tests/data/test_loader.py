"""The stream of batches: the same from any start, for any number of hosts and workers."""

import logging
import subprocess
import sys
import textwrap
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from tiny import OBJECTIVE

from flax_diffusion.core.data import bad
from flax_diffusion.core.data import loader as loader_module
from flax_diffusion.core.data import order as order_module
from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.order import example_at
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.objectives.objective import Mixture

NOISE = NoiseSpec(objective=OBJECTIVE, shape=(1, 2, 2))
MAKE = ExampleFn(transform=ImageTransform(resolution=8, channels=1, random_flip=True), noise=NOISE)


def digits(count=None):
    return open_source(dataset_name="digits", max_train_samples=count)


def batches(source, steps, make=MAKE, **options):
    with Loader(source, make, seed=1, **options) as loader:
        return list(islice(loader, steps))


def stream(given):
    """Undo the batching of one process: every key as one array, example by example."""
    return {key: np.concatenate([batch[key].reshape(-1, *batch[key].shape[2:]) for batch in given]) for key in given[0]}


def assert_same(given, expected):
    assert given.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(given[key], expected[key], err_msg=key)


@pytest.mark.parametrize("limit", [2**20, 0])  # permutations, Grain's cipher
@pytest.mark.parametrize("count", [1, 2, 5, 100, 1797])
def test_every_epoch_is_a_permutation(count, limit, monkeypatch):
    monkeypatch.setattr(order_module, "_MAX_PERMUTED", limit)
    orders = []
    for epoch in range(3):
        places = [example_at(epoch * count + n, count=count, seed=0, shuffle=True) for n in range(count)]
        assert {place[0] for place in places} == {epoch}
        orders.append([place[1] for place in places])
        assert sorted(orders[-1]) == list(range(count))
    if count >= 100:
        assert orders[0] != orders[1] != orders[2]
        other = [example_at(n, count=count, seed=1, shuffle=True)[1] for n in range(count)]
        # Neighbouring seeds and epochs must not share orders, as adding the two up would make them.
        assert other not in orders


def test_a_set_too_large_for_a_permutation():
    indices = [example_at(n, count=10**9, seed=0, shuffle=True)[1] for n in range(1000)]
    assert len(set(indices)) == 1000
    assert 0.45e9 < np.mean(indices) < 0.55e9  # 5 standard errors


def test_order_is_fair():
    # Each of 7 examples comes first, and last, equally often.
    for place in (0, 6):
        firsts = [example_at(epoch * 7 + place, count=7, seed=0, shuffle=True)[1] for epoch in range(3500)]
        counts = np.bincount(firsts, minlength=7)
        assert ((counts - 500) ** 2 / 500).sum() < 22.5  # chi-square with 6 degrees of freedom, p = 0.001


def test_order_is_pinned():
    # A change here breaks the resuming of every run under way.
    got = [example_at(n, count=10, seed=42, shuffle=True) for n in range(8, 14)]
    assert got == [(0, 5), (0, 2), (1, 8), (1, 5), (1, 1), (1, 9)]


def test_without_shuffling():
    got = stream(batches(digits(5), 3, batch_size=4, shuffle=False))
    assert got["example_index"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert not np.array_equal(got["noise"][0], got["noise"][5])  # the epoch differs


def test_shapes_and_types():
    batch = batches(digits(), 1, batch_size=3, accumulation=2)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "pixel_values": ((2, 3, 1, 8, 8), "float32"),
        "timesteps": ((2, 3), "int32"),
        **dict.fromkeys(Mixture._fields[1:], ((2, 3), "float32")),
        "noise": ((2, 3, 1, 2, 2), "float32"),
        "example_index": ((2, 3), "int64"),
    }


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 3, "prefetch": 1}, {"prefetch": 7}])
def test_threads_do_not_matter(options):
    assert_same(stream(batches(digits(), 4, batch_size=6, **options)), stream(batches(digits(), 4, batch_size=6)))


@pytest.mark.parametrize("start", [1, 7, 24, 1000])
def test_start_anywhere(start):
    whole = stream(batches(digits(23), 130, batch_size=8))
    later = stream(batches(digits(23), 3, batch_size=4, accumulation=2, start_example=start))
    assert_same(later, {key: value[start : start + 24] for key, value in whole.items()})


@pytest.mark.parametrize("accumulation", [1, 3])
def test_hosts_together_give_the_same_batches(accumulation):
    one = batches(digits(29), 4, batch_size=4, accumulation=accumulation, start_example=5)
    parts = [
        batches(
            digits(29), 4, batch_size=2, accumulation=accumulation, start_example=5, process_index=n, process_count=2
        )
        for n in range(2)
    ]
    for step, expected in enumerate(one):
        together = {key: np.concatenate([part[step][key] for part in parts], axis=1) for key in expected}
        assert_same(together, expected)


def test_fewer_examples_than_a_batch():
    got = stream(batches(digits(3), 2, batch_size=8))
    indices = got["example_index"]
    for epoch in range(5):
        assert sorted(indices[epoch * 3 : epoch * 3 + 3]) == [0, 1, 2]
    # The same picture in several epochs of one batch has its own noise in each.
    assert len({noise.tobytes() for noise in got["noise"]}) == 16


def test_num_steps_and_iterating_again():
    loader = Loader(digits(), MAKE, seed=0, batch_size=2, accumulation=3, num_steps=4)
    assert loader.global_batch_size == 6
    first, second = list(loader), list(loader)
    assert len(first) == 4
    assert_same(stream(first), stream(second))
    loader.close()


def test_closing_ends_an_iteration():
    loader = Loader(digits(), MAKE, seed=0, batch_size=2)
    steps = iter(loader)
    next(steps)
    loader.close()
    assert list(steps) == []


def test_no_examples():
    with pytest.raises(DataError, match="holds no examples"):
        Loader([], MAKE, seed=0, batch_size=2)


# Bad images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten pictures, of which numbers 3, 4 and 9 cannot be decoded, and no more."""
    monkeypatch.setattr(bad, "MAX_BAD_SHARE", 0.3)
    for number in range(10):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        if number in (3, 4, 9):
            path.write_bytes(path.read_bytes()[:40])
    return open_source(train_data_dir=tmp_path, caption_column=None)


def test_a_bad_image_is_an_error(folder):
    loader = Loader(folder, MAKE, seed=0, batch_size=2, shuffle=False)
    steps = iter(loader)
    assert next(steps)["example_index"].tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"3\.png is not an image"):
        next(steps)
    assert list(steps) == []


def test_skipping(folder, caplog):
    loader = Loader(folder, MAKE, seed=0, batch_size=5, shuffle=False, skip_bad_images=True, num_steps=4)
    with caplog.at_level(logging.WARNING):
        got = stream(list(loader))
    assert got["example_index"].tolist() == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0] * 2
    # Each has the randomness of its own index.
    for row, index in enumerate(got["example_index"]):
        np.testing.assert_array_equal(got["noise"][row], MAKE(folder, 0, row // 10, index)["noise"])
    assert [name[-5:] for name in sorted(loader.skipped)] == ["3.png", "4.png", "9.png"]
    assert all("png is not an image" in reason for reason in loader.skipped.values())
    assert len(caplog.records) == 3  # once each, not once an epoch


def test_skipping_does_not_move_good_ones(folder, tmp_path):
    options = {"seed": 5, "batch_size": 10, "skip_bad_images": True, "num_steps": 3}
    got = stream(list(Loader(folder, MAKE, **options)))
    for number in (3, 4, 9):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    whole = stream(list(Loader(folder, MAKE, **options)))
    good = ~np.isin(whole["example_index"], [3, 4, 9])
    assert good.sum() == 21
    assert_same({key: value[good] for key, value in got.items()}, {key: value[good] for key, value in whole.items()})


@pytest.mark.parametrize(("limit", "message"), [(100, "10 examples in a row"), (1, "2 examples in a row")])
def test_too_many_in_a_row(folder, tmp_path, monkeypatch, limit, message):
    monkeypatch.setattr(loader_module, "MAX_CONSECUTIVE_BAD", limit)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=message + r" cannot be used; check the dataset\. .*\.png is empty"):
        next(iter(Loader(folder, MAKE, seed=0, batch_size=2, skip_bad_images=True)))


@pytest.mark.parametrize("count", [8, 400])
def test_too_many_in_all(tmp_path, count):
    """Of few pictures one may be bad, of many one in a hundred; the same picture counts once."""
    for number in range(count):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:03}.png")
    source = open_source(train_data_dir=tmp_path, caption_column=None)
    limit = max(1, count // 100)
    for number in range(limit):
        (tmp_path / f"{number * 7:03}.png").write_bytes(b"")
    options = {"batch_size": 8, "num_steps": 2 * count // 8, "skip_bad_images": True}
    with Loader(source, MAKE, seed=0, **options) as loader:
        assert len(list(loader)) == 2 * count // 8
        assert len(loader.skipped) == limit
    (tmp_path / "001.png").write_bytes(b"")
    with (
        Loader(source, MAKE, seed=0, **options) as loader,
        pytest.raises(DataError, match=rf"^{limit + 1} of {count} examples cannot be used, over 1% of them: .*\.png"),
    ):
        list(loader)


# Worker processes


@pytest.mark.parametrize("accumulation", [1, 2])
def test_workers_give_the_same_batches(accumulation):
    """Also where pictures move in 8 bits from a worker, or are scaled in a thread."""
    make = ExampleFn(transform=ImageTransform(resolution=128, channels=1), noise=NOISE)
    options = {"batch_size": 8, "accumulation": accumulation, "start_example": 11}
    expected = batches(digits(50), 5, make, **options)
    for given, workers in ((make, 2), (make.unscaled, 2), (make.unscaled, 0)):
        got = batches(digits(50), 5, given, num_workers=workers, **options)
        assert_same(stream(got), stream(expected))
        assert got[0]["pixel_values"].dtype == np.float32
        assert got[0]["pixel_values"].flags.c_contiguous


def test_an_error_in_a_worker_arrives(folder, caplog):
    steps = iter(Loader(folder, MAKE, seed=0, batch_size=2, shuffle=False, num_workers=1))
    assert next(steps)["example_index"].tolist() == [[0, 1]]
    with pytest.raises(DataError) as caught:
        next(steps)
    name = folder[3].name
    assert str(caught.value) == f"{name} is not an image in a supported format; remove or convert it"
    skipping = Loader(
        folder, MAKE, seed=0, batch_size=5, shuffle=False, num_workers=1, skip_bad_images=True, num_steps=2
    )
    with caplog.at_level(logging.WARNING):
        assert stream(list(skipping))["example_index"].tolist() == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    assert len(caplog.records) == len(skipping.skipped) == 3


def test_exit_with_workers_is_quiet(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from flax_diffusion.core.data.batches import ExampleFn
        from flax_diffusion.core.data.loader import Loader
        from flax_diffusion.core.data.images.transforms import ImageTransform
        from flax_diffusion.core.data.sources.opening import open_source
        from flax_diffusion.core.objectives.noising import NoiseSpec

        if __name__ == "__main__":
            make = ExampleFn(transform=ImageTransform(resolution=128), noise=NoiseSpec(shape=(1, 8, 8)))
            steps = iter(Loader(open_source(dataset_name="digits"), make, seed=0, batch_size=8, num_workers=1))
            for _ in range(3):
                next(steps)
            sys.exit(3)  # with batches under way, and never closed
    """)
    )
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False, env={"PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (3, "")


MANY = 2**20 + 7
"""Examples of which the order is no permutation in memory but a cipher over the indices."""


def order(places, epoch=0, seed=0):
    return [example_at(epoch * MANY + place, count=MANY, seed=seed, shuffle=True)[1] for place in places]


def test_the_order_of_very_many_examples():
    """No example twice, none outside the source; another order in another epoch and with another seed."""
    places = [*range(20_000), *range(20_000, MANY, 53), *range(MANY - 20_000, MANY)]
    places = sorted(set(places))
    found = np.array(order(places))
    assert len(set(found.tolist())) == len(places)  # with repeats as of chance there would be 1,600 fewer
    assert found.min() >= 0
    assert found.max() < MANY
    shares = np.bincount(found * 16 // MANY, minlength=16) / len(places)
    np.testing.assert_allclose(shares, 1 / 16, atol=5 * (1 / 16 / len(places)) ** 0.5)
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02
    first = found[:2000]
    for other in (order(places[:2000], epoch=1), order(places[:2000], seed=1)):
        assert (first == other).sum() < 5
    np.testing.assert_array_equal(order(places[:2000]), first)


@pytest.mark.acceptance
def test_an_epoch_of_very_many_examples_is_whole():
    np.testing.assert_array_equal(np.sort(order(range(MANY))), np.arange(MANY))
