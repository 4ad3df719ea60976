"""Features of pictures for the metrics: one compiled function, over all devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_diffusion.core.errors import unknown
from flax_diffusion.core.metrics.judging import FEATURES, INCEPTION, PIXELS
from flax_diffusion.jax_backend.processes import to_host
from flax_diffusion.jax_backend.sharding import batch_sharding, put, put_replicated
from flax_diffusion.models.inception import POOL_FEATURES, FlaxInceptionV3, InceptionWeights

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt8


class FeatureExtractor:
    """Computes the features of pictures; see `core.metrics.judging.Extractor`.

    Args:
        feature: Name of the feature.
        mesh: Devices over which a batch is split.
        batch_size: Pictures at a time. A smaller batch is filled up, so that all have one compiled shape.
        inception: Weights of the network; None where the feature needs none.
    """

    def __init__(self, feature: str, mesh: Mesh, batch_size: int, inception: InceptionWeights | None = None):
        functions = {INCEPTION: inception_features, PIXELS: pixel_features}
        if feature not in functions:
            raise unknown("feature", feature, FEATURES)
        assert (feature == INCEPTION) == (inception is not None)
        self.feature, self._mesh = feature, mesh
        self.weights = None if inception is None else inception.fingerprint
        self._rows = -(-batch_size // mesh.size) * mesh.size
        self._params: Any = None if inception is None else put_replicated(inception.params, mesh)
        self._compute = jax.jit(functions[feature])

    def dimension(self, size: tuple[int, int], channels: int) -> int:
        """Return the number of features of pictures.

        Args:
            size: Height and width, pixels.
            channels: Channels of the pictures.
        """
        return POOL_FEATURES if self.feature == INCEPTION else size[0] * size[1] * channels

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Compute the features of pictures.

        Args:
            pictures: Pictures, uint8 (B, H, W, 1 or 3), of any number; the same in every process.

        Returns:
            The features, float32 (B, D), and the logits, float32 (B, classes), or None where there are none.
        """
        found = [self._batch(pictures[first : first + self._rows]) for first in range(0, len(pictures), self._rows)]
        features, logits = zip(*found, strict=True)
        return np.concatenate(features), None if logits[0] is None else np.concatenate(logits)

    def _batch(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        count = len(pictures)
        if count < self._rows:
            pictures = np.concatenate([pictures, np.repeat(pictures[-1:], self._rows - count, 0)])
        found = self._compute(self._params, put(pictures, batch_sharding(self._mesh, leading=0)))
        features, logits = to_host(found)
        return features[:count], None if logits is None else logits[:count]


def inception_features(
    params: Any, pictures: UInt8[Array, "B H W C"]
) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"]]:
    """Return the pool features of the Inception network, and its logits without the bias of the last layer.

    The published Inception scores are of such logits: their code multiplied by the weights alone.

    Args:
        params: Parameters of the network.
        pictures: Pictures, uint8 (B, H, W, 1 or 3); grey ones stand for RGB.

    Reference:
        Salimans et al., https://arxiv.org/abs/1606.03498, and its code, `inception_score/model.py`.
    """
    pixels = pictures.astype(jnp.float32) / 127.5 - 1
    pixels = jnp.broadcast_to(pixels, (*pixels.shape[:3], 3))
    found = FlaxInceptionV3().apply({"params": params}, pixels)
    features, logits = found  # pyright: ignore[reportAssignmentType]  # Flax declares that variables may come too
    return features, logits - params["fc"]["bias"]


def pixel_features(params: None, pictures: UInt8[Array, "B H W C"]) -> tuple[Float[Array, "B D"], None]:
    """Return the pixels themselves in 0..1, row by row, with the channels of a pixel side by side.

    Args:
        params: None, as no network is needed.
        pictures: Pictures, uint8 (B, H, W, C).
    """
    del params
    return pictures.reshape(len(pictures), -1).astype(jnp.float32) / 255, None
