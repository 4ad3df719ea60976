"""Which pictures are held out, and what is drawn for them."""

import numpy as np
import pytest
from tiny import OBJECTIVE, RUN, pictures

from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.data.combined import CombinedSource
from flax_diffusion.core.data.sources.source import ArraySource
from flax_diffusion.core.errors import ConfigError, UserError
from flax_diffusion.core.objectives.edm import Edm
from flax_diffusion.core.objectives.flow_matching import FlowMatching
from flax_diffusion.core.randomness.streams import VALIDATION_EPOCH, Stream, example_rng, rngs_of
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.validation.held_out import divide
from flax_diffusion.core.validation.loss import ValidationOrder


def task(**options):
    return task_of(merge("unconditional", {}, RUN | options, "test"))


def divided(**options):
    made = task(**options)
    return divide(made, made.open_source())


def names(source):
    return [source[index].name for index in range(len(source))]


def numbered(count, name):
    return ArraySource(np.zeros((count, 8, 8), np.uint8), None, name)


def test_a_share_is_held_out_and_never_trains():
    source = numbered(200, "some")
    training, validation = divide(task(validation_split=0.05), source)
    assert len(validation) == 10
    assert sorted(names(training) + names(validation)) == sorted(names(source))
    again = divide(task(validation_split=0.05), source)
    assert names(again[1]) == names(validation)
    assert names(divide(task(validation_split=0.05, seed=1), source)[1]) != names(validation)
    more = set(names(divide(task(validation_split=0.1), source)[1]))
    assert set(names(validation)) < more, "a larger share holds out others"
    assert names(divide(task(validation_split=0.05, max_validation_samples=3), source)[1]) == names(validation)[:3]


def test_the_choice_of_a_picture_does_not_depend_on_those_after_it():
    few, many = (set(names(divide(task(validation_split=0.3), numbered(n, "some"))[1])) for n in (100, 110))
    assert len(few & many) > 0.7 * len(few)


def test_a_picture_that_occurs_several_times_is_held_out_everywhere():
    source = CombinedSource([numbered(10, "a"), numbered(10, "b")], [None, None], [3, 2])
    training, validation = divide(task(validation_split=0.25), source)
    assert len(validation) == len(set(names(validation))) == 5
    assert not set(names(training)) & set(names(validation))
    assert set(names(training)) | set(names(validation)) == set(names(source))
    kept = names(training)
    assert all(kept.count(name) == (3 if name.startswith("a") else 2) for name in kept)


def test_folders_that_share_pictures_are_refused(tmp_path):
    folder = pictures(tmp_path / "all")
    inside = pictures(folder / "some", 2)
    options = {"dataset_name": None, "train_data_dir": str(folder), "validation_data_dir": str(inside)}
    options |= {"resolution": 16, "max_train_samples": None}
    with pytest.raises(ConfigError, match=r"--validation_data_dir .*: 2 of its pictures are in the training data too"):
        divided(**options)
    (folder / "metadata.jsonl").unlink()
    (inside / "metadata.jsonl").unlink()
    inside.rename(folder / "val")
    (folder / "train").mkdir()
    for picture in folder.glob("*.png"):
        picture.rename(folder / "train" / picture.name)
    training, validation = divided(**options | {"validation_data_dir": str(folder / "val")})  # which splits' names tell
    assert (len(training), len(validation)) == (6, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_split": 0.9, "max_train_samples": 4}, "--validation_split 0.9: holds out 4 of 4 pictures"),
        ({"validation_split": 1.0}, "--validation_split: must be less than 1, got 1.0"),
        ({"validation_split": 0.1, "validation_data_dir": "x"}, "exclude each other"),
        ({"validation_loss_steps": 5}, "--validation_loss_steps is of pictures that do not train: add"),
        ({"max_validation_samples": 5}, "--max_validation_samples is of pictures that do not train: add"),
        ({"validation_data_dir": "/not/there"}, "--validation_data_dir: /not/there"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError) as error:
        divided(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_classes_of_another_dataset_are_refused(tmp_path):
    for name, classes in (("data", "ab"), ("val", "bc")):
        for one in classes:
            pictures(tmp_path / name / one, 2)
            (tmp_path / name / one / "metadata.jsonl").unlink()
    options = {name: value for name, value in RUN.items() if name not in ("unet", "dataset_name", "max_train_samples")}
    options |= {"train_data_dir": str(tmp_path / "data"), "validation_data_dir": str(tmp_path / "val")}
    options |= {"transformer": "DiT-S/2"}
    made = task_of(merge("class_conditional", {}, options, "test"))
    with pytest.raises(ConfigError, match="has the class c, which the training data lack, whose classes are a, b"):
        divide(made, made.open_source())
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "a")
    _, validation = divide(made, made.open_source())
    assert [validation[index].label for index in range(4)] == [0, 0, 1, 1]


def draws(objective, epoch, count):
    return np.array([float(objective.draw(rngs_of(0, epoch, i)(Stream.TIMESTEP)).timesteps) for i in range(count)])


@pytest.mark.parametrize("objective", [FlowMatching(), FlowMatching(logit_normal=(0.0, 1.0)), Edm(), OBJECTIVE])
def test_times_are_spread_over_their_distribution(objective):
    """Of 100 examples each hundredth of the distribution has about one, at every start of the sequence."""
    reference = np.sort(draws(objective, 0, 20000))
    spread = draws(objective, VALIDATION_EPOCH, 100)
    for part in (spread, spread[:30], spread[40:70]):
        shares = np.sort(np.searchsorted(reference, part) / len(reference))
        assert np.abs(shares - (np.arange(len(part)) + 0.5) / len(part)).max() < 2.5 / len(part)
    usual = np.sort(np.searchsorted(reference, draws(objective, 1, 100)) / len(reference))
    assert np.abs(usual - (np.arange(100) + 0.5) / 100).max() > 2.5 / 100
    assert (draws(objective, VALIDATION_EPOCH, 100) == spread).all()


def test_training_draws_as_it_did():
    for stream in Stream:
        ours, theirs = rngs_of(3, 2, 7)(stream), example_rng(3, stream, 2, 7)
        assert ours.random() == theirs.random()
    spread = rngs_of(0, VALIDATION_EPOCH, 4)(Stream.TIMESTEP)
    assert spread.integers(5, 9) in range(5, 9)
    assert spread.random() == example_rng(0, Stream.TIMESTEP, VALIDATION_EPOCH, 4).random()  # its second draw


def test_nothing_of_an_example_is_left_out_or_changed():
    made = task_of(
        merge(
            "class_conditional", {},
            {name: value for name, value in RUN.items() if name != "unet"}
            | {"transformer": "DiT-S/2", "class_dropout_prob": 0.9, "random_flip": True, "input_perturbation": 0.5},
            "test",
        )
    )  # fmt: skip
    source = made.open_source()
    make = made.make_example_fn(made.make_spec(source)).for_validation()
    for index in range(20):
        example = make(source, 0, VALIDATION_EPOCH, index)
        assert example["class_labels"] == source[index].label
        assert "perturbation" not in example
        np.testing.assert_array_equal(example["pixel_values"][0], source[index].image / np.float32(127.5) - 1)
        again = make(source, 0, VALIDATION_EPOCH, index)
        assert all((again[name] == array).all() for name, array in example.items())


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_order_takes_each_once_and_fills_up(batch_size):
    sizes = [(8, 16), (16, 8), (8, 16), (16, 8), (16, 8), (16, 16), (8, 16)]
    for given in (None, sizes):
        order = ValidationOrder(7, batch_size, given)
        places = [order.at(position) for position in range(len(order.indices))]
        assert len(places) == order.batches * batch_size
        assert sorted(order.indices[order.counts]) == list(range(7))
        for first in range(0, len(places), batch_size):
            assert len({place.size for place in places[first : first + batch_size]}) == 1
        if given:
            assert all(place.size == sizes[place.index] for place in places)
            assert {order.following(places[0], attempt) for attempt in range(3)} == {0, 2, 6}
