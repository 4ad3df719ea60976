"""Counter-based randomness: every draw is a function of (seed, stream, epoch, example index) alone.

Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a counter to
random words. The key holds the seed and the stream, the two high words of the counter hold the example and the
epoch, and NumPy counts up the low words while it draws. So no draw depends on which others were made, on the
number of devices, hosts or workers, or on where a run was interrupted.
"""

from enum import IntEnum
from typing import Any

import numpy as np

_WORD = 2**64


class Stream(IntEnum):
    """What a random number is for. A number here never changes meaning, so a new option moves no other draw."""

    TIMESTEP = 0
    NOISE = 1
    LATENT = 2  # the sample from the autoencoder's posterior
    OFFSET = 3
    PERTURBATION = 4
    CROP = 5
    FLIP = 6
    CAPTION = 7  # which of several captions
    DROPOUT_CAPTION = 8
    SHUFFLE = 9  # the order of an epoch; its index is 0
    SAMPLE = 10  # noise of a generated image; its epoch is the denoising step
    WEIGHTS = 11  # first values of a parameter; its index is made of the parameter's name


class _NoEntropy(np.random.bit_generator.ISeedSequence):
    """Stands in for the operating system's entropy, whose reading costs 20 µs and would be overwritten."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """Return zeros."""
        return np.zeros(n_words, dtype)


_NO_ENTROPY = _NoEntropy()


def example_rng(seed: int, stream: Stream, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one stream of one example, positioned at its first draw.

    Args:
        seed: of the run, in [0, 2**64).
        stream: what the numbers are for.
        epoch: pass over the data, from 0.
        index: of the example in its source, from 0.

    Returns:
        A generator of its own: the same as
        `Generator(Philox(key=[seed, stream], counter=[0, 0, index, epoch]))`, four times faster to make.
    """
    if not 0 <= seed < _WORD:
        raise ValueError(f"seed is {seed}; it must lie in [0, 2**64)")
    philox = np.random.Philox(_NO_ENTROPY)  # type: ignore[arg-type]  # the stubs omit ISeedSequence
    philox.state = {  # pyright: ignore[reportAttributeAccessIssue]  # tuples do for arrays, and are faster
        "bit_generator": "Philox",
        "state": {"counter": (0, 0, index, epoch), "key": (seed, int(stream))},
        "buffer": (0, 0, 0, 0),
        "buffer_pos": 4,  # the buffer of four words is empty
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(philox)


def sampling_noise(seed: int, indices: np.ndarray, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the noise that a sampler takes for some images at one step.

    Args:
        seed: of the samples.
        indices: numbers of the images, (B,).
        step: 0 for the noise that sampling starts from, i + 1 for denoising step i.
        shape: of one image or latent.

    Returns:
        Standard normal float32, (B, *shape).
    """
    rngs = (example_rng(seed, Stream.SAMPLE, step, int(index)) for index in indices)
    return np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
