"""The counter-based draws: their values, independence and statistics."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from tiny import OBJECTIVE

from flax_diffusion.core.objectives.ddpm import ddpm
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.objectives.objective import Mixture
from flax_diffusion.core.randomness.streams import Stream, example_rng

noising = partial(NoiseSpec, objective=OBJECTIVE)


def draw(spec: NoiseSpec, seed: int = 0, epoch: int = 0, index: int = 0) -> dict[str, np.ndarray]:
    return spec.draw(lambda stream: example_rng(seed, stream, epoch, index))


def test_stream_numbers_never_change():
    pinned = "TIMESTEP NOISE LATENT OFFSET PERTURBATION CROP FLIP CAPTION DROPOUT_CAPTION SHUFFLE"
    assert " ".join(stream.name for stream in Stream).startswith(pinned)  # new ones go after these
    assert [stream.value for stream in Stream] == list(range(len(Stream)))


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 1, 2**64 - 1])
def test_generator_is_philox_at_that_counter(seed):
    key = np.array([seed, Stream.CROP], np.uint64)
    counter = np.array([0, 0, 123, 45], np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key, counter=counter))
    ours = example_rng(seed, Stream.CROP, 45, 123)
    np.testing.assert_array_equal(ours.standard_normal(1001, np.float32), expected.standard_normal(1001, np.float32))
    np.testing.assert_array_equal(ours.integers(7, size=99), expected.integers(7, size=99))


def test_draws_are_pinned():
    # A change here breaks the resuming of every run under way.
    drawn = draw(noising(shape=(1, 1, 3)), seed=42, epoch=3, index=17)
    assert drawn["timesteps"] == 980
    np.testing.assert_array_equal(drawn["noise"].ravel(), np.array([0.36048084, 0.2144172, 1.615419], np.float32))


def test_generators_do_not_disturb_each_other():
    first, second = example_rng(0, Stream.NOISE, 0, 0), example_rng(0, Stream.NOISE, 0, 1)
    alternating = [(first.random(), second.random()) for _ in range(5)]
    alone = example_rng(0, Stream.NOISE, 0, 0).random(5)
    np.testing.assert_array_equal([a for a, _ in alternating], alone)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=r"must lie in"):
        example_rng(seed, Stream.NOISE, 0, 0)


def test_options_do_not_move_other_draws():
    plain = noising(shape=(4, 8, 8))
    everything = replace(plain, input_perturbation=0.1, latent_noise=True)
    expected, drawn = draw(plain, 5, 1, 9), draw(everything, 5, 1, 9)
    for key in expected:
        np.testing.assert_array_equal(drawn[key], expected[key])
    assert set(drawn) - set(expected) == {"perturbation", "latent_noise"}


def test_shapes_and_types():
    spec = noising(shape=(4, 8, 6), noise_offset=0.1, input_perturbation=0.1, latent_noise=True)
    drawn = draw(spec)
    assert {key: (value.shape, value.dtype.name) for key, value in drawn.items()} == {
        "timesteps": ((), "int32"),
        **dict.fromkeys(Mixture._fields[1:], ((), "float32")),
        "noise": ((4, 8, 6), "float32"),
        "perturbation": ((4, 8, 6), "float32"),
        "latent_noise": ((4, 8, 6), "float32"),
    }


def test_every_pair_of_streams_is_uncorrelated():
    spec = noising(shape=(4, 64, 64), input_perturbation=1.0, latent_noise=True)
    arrays = [draw(spec, *key)[name].ravel() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
              for name in ("noise", "perturbation", "latent_noise")]  # fmt: skip
    correlations = np.corrcoef(arrays) - np.eye(len(arrays))
    assert np.abs(correlations).max() < 5 / 128  # 5 standard errors at 128² samples


def test_noise_is_standard_normal():
    samples = np.sort(np.concatenate([draw(noising(shape=(4, 32, 32)), index=n)["noise"].ravel() for n in range(50)]))
    count = len(samples)
    assert abs(samples.mean()) < 4 / count**0.5
    assert abs(samples.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((samples**4).mean() - 3) < 4 * (96 / count) ** 0.5


def test_timesteps_are_uniform():
    steps = np.array(
        [
            draw(NoiseSpec(objective=ddpm(np.full(10, 0.5), "epsilon"), shape=(1, 1, 1)), index=n)["timesteps"]
            for n in range(5000)
        ]
    )
    counts = np.bincount(steps, minlength=10)
    assert len(counts) == 10
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001


def test_offset_is_one_number_a_channel():
    plain, offset = (noising(shape=(4, 16, 16)), noising(shape=(4, 16, 16), noise_offset=0.25))
    shift = draw(offset)["noise"] - draw(plain)["noise"]
    expected = 0.25 * example_rng(0, Stream.OFFSET, 0, 0).standard_normal((4, 1, 1), np.float32)
    np.testing.assert_allclose(shift, np.broadcast_to(expected, shift.shape), atol=1e-6)
    assert len(np.unique(expected)) == 4


def test_perturbation_is_scaled():
    small = draw(noising(shape=(1, 8, 8), input_perturbation=0.5))["perturbation"]
    large = draw(noising(shape=(1, 8, 8), input_perturbation=1.0))["perturbation"]
    np.testing.assert_array_equal(small * 2, large)
