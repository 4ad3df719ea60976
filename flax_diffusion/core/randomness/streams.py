"""Counter-based randomness: every draw is a function of (seed, stream, epoch, example index) alone.

Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a counter to
random words. The key holds the seed and the stream, the two high words of the counter hold the example and the
epoch, and NumPy counts up the low words while it draws. So no draw depends on the other draws, on the number of
devices, hosts or workers, or on where a run was interrupted.
"""

import math
from collections.abc import Callable
from enum import IntEnum
from statistics import NormalDist
from typing import Any

import numpy as np

_WORD = 2**64

VALIDATION_EPOCH = 2**63
"""Epoch that validation examples draw from. No training comes to it."""
_GOLDEN = (math.sqrt(5) - 1) / 2


class Stream(IntEnum):
    """What a random number is for. A stream keeps its number for ever, so a new option changes no other draw."""

    TIMESTEP = 0
    NOISE = 1
    LATENT = 2  # the sample from the autoencoder's posterior
    OFFSET = 3
    PERTURBATION = 4
    CROP = 5
    FLIP = 6
    CAPTION = 7  # which of several captions
    DROPOUT_CAPTION = 8
    SHUFFLE = 9  # the order of an epoch; the index is 0
    SAMPLE = 10  # noise of a generated image; the epoch is the denoising step
    WEIGHTS = 11  # initial values of a parameter; the index is `initial_weights.name_number`
    MASK = 12  # what an inpainting model has to fill in
    MASKED_LATENT = 13  # the sample from the autoencoder's posterior of the rest
    DROPOUT_LABEL = 14
    HELD_OUT = 15  # the order in which pictures are kept for validation; epoch and index are 0


class _NoEntropy(np.random.bit_generator.ISeedSequence):
    """A stand-in for the operating system's entropy, which takes 20 µs to read and would be overwritten."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return zeros."""
        return np.zeros(n_words, dtype)


_NO_ENTROPY = _NoEntropy()


def example_rng(seed: int, stream: Stream, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one stream of one example, positioned at its first draw.

    Args:
        seed: Seed of the run, in [0, 2**64).
        stream: What the numbers are for.
        epoch: Pass over the data, from 0.
        index: Index of the example in its source, from 0.

    Returns:
        A new generator, equal to `Generator(Philox(key=[seed, stream], counter=[0, 0, index, epoch]))` and four times
        faster to make.

    Raises:
        ValueError: If the seed is out of range.
    """
    if not 0 <= seed < _WORD:
        raise ValueError(f"seed is {seed}; it must lie in [0, 2**64)")
    philox = np.random.Philox(_NO_ENTROPY)  # type: ignore[arg-type]  # the stubs omit ISeedSequence
    philox.state = {  # pyright: ignore[reportAttributeAccessIssue]  # NumPy takes tuples for arrays, and they are faster
        "bit_generator": "Philox",
        "state": {"counter": (0, 0, index, epoch), "key": (seed, int(stream))},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # the buffer of four words is empty
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(philox)


def rngs_of(seed: int, epoch: int, index: int) -> Callable[[Stream], np.random.Generator]:
    """Return the function that gives the generators of an example, by stream.

    In validation the times of the examples are spread evenly over their distribution: example i takes its share of it
    at frac(i · 0.618… + a share drawn by the seed), whose first n values lie apart from each other for every n.

    Args:
        seed: Seed of the run.
        epoch: Pass over the data, from 0; or `VALIDATION_EPOCH`.
        index: Index of the example in its source, from 0.

    Reference:
        Kingma et al., https://arxiv.org/abs/2107.00630, appendix I.1, for times that are spread; Roberts 2018, "The
        unreasonable effectiveness of quasirandom sequences", for the sequence.
    """

    def rng(stream: Stream) -> np.random.Generator:
        made = example_rng(seed, stream, epoch, index)
        if epoch != VALIDATION_EPOCH or stream is not Stream.TIMESTEP:
            return made
        first = example_rng(seed, stream, epoch, _WORD - 1).random()
        return _Spread(made, (first + index * _GOLDEN) % 1)

    return rng


class _Spread(np.random.Generator):
    """A generator whose first draw is at a given share of its distribution.

    That of other methods than these three is a usual one.
    """

    def __init__(self, rng: np.random.Generator, share: float):
        super().__init__(rng.bit_generator)
        self._share: float | None = share

    def _first(self, size: Any) -> float | None:
        share, self._share = self._share, None
        return share if size is None else None

    def random(self, size: Any = None, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Draw from 0..1, without 1."""
        share = self._first(size)
        return super().random(size, *args, **options) if share is None else share

    def standard_normal(self, size: Any = None, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Draw from the standard normal distribution."""
        share = self._first(size)
        if share is None:
            return super().standard_normal(size, *args, **options)
        return NormalDist().inv_cdf(min(max(share, 1e-12), 1 - 1e-12))

    def integers(self, low: Any, high: Any = None, size: Any = None, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Draw a whole number from low, or 0, to high, or low, without the latter."""
        share = self._first(size)
        if share is None:
            return super().integers(low, high, size, *args, **options)
        first, end = (0, low) if high is None else (low, high)
        return first + int(share * (end - first))


def sampling_noise(seed: int, indices: np.ndarray, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the noise that a sampler needs for some images at one step.

    Args:
        seed: Seed of the samples.
        indices: Numbers of the images, (B,).
        step: 0 for the noise that sampling starts from, i + 1 for denoising step i.
        shape: Shape of one image or latent.

    Returns:
        Standard normal noise, float32 (B, *shape).
    """
    rngs = (example_rng(seed, Stream.SAMPLE, step, int(index)) for index in indices)
    return np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
