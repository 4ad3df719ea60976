"""Features of pictures for the metrics, without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.metrics.judging import PIXELS

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


class PixelFeatures:
    """The pixels themselves in 0..1, as of `flax_diffusion.jax_backend.features`; see `judging.Extractor`."""

    feature: str = PIXELS
    weights: str | None = None

    def dimension(self, size: tuple[int, int], channels: int) -> int:
        """Return the number of features of pictures of a height and width in pixels."""
        return size[0] * size[1] * channels

    def __call__(self, pictures: UInt8[np.ndarray, "B H W C"]) -> tuple[Float[np.ndarray, "B D"], None]:
        """Return the features, and None in place of logits."""
        return pictures.reshape(len(pictures), -1).astype(np.float32) / 255, None


def extractor(feature: str, inception: str | None, batch_size: int) -> PixelFeatures:
    """Return what computes features of pictures; see `core.backend.Backend.extractor`.

    Raises:
        ConfigError: For the features of a network, which only the JAX backend has.
    """
    del inception, batch_size
    if feature != PIXELS:
        raise ConfigError(
            f"--features {feature}: only the JAX backend has the network: use pixels, or judge the finished run by "
            "python -m flax_diffusion.evaluate"
        )
    return PixelFeatures()
