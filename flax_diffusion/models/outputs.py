"""Outputs of the models: dataclasses that jit passes through and that, as upstream's, index like tuples."""

from dataclasses import fields
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


class ModelOutput:
    """Base of the outputs: `output[0]` is the first value that is not None, `output["name"]` a field."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in field order."""
        values = (getattr(self, field.name) for field in fields(self))  # pyright: ignore[reportArgumentType]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@flax.struct.dataclass
class FlaxUNet2DOutput(ModelOutput):
    """Output of FlaxUNet2DModel.

    Attributes:
        sample: Prediction, (B, out_channels, H, W), in the model's dtype.
    """

    sample: jax.Array


@flax.struct.dataclass
class FlaxUNet2DConditionOutput(ModelOutput):
    """Output of FlaxUNet2DConditionModel.

    Attributes:
        sample: Prediction, (B, out_channels, H, W), in the model's dtype.
    """

    sample: jax.Array


@flax.struct.dataclass
class FlaxDecoderOutput(ModelOutput):
    """Output of the autoencoder's decoder.

    Attributes:
        sample: Images in [-1, 1], (B, out_channels, H, W).
    """

    sample: jax.Array


@flax.struct.dataclass
class FlaxDiagonalGaussianDistribution:
    """The autoencoder's posterior, a Gaussian with diagonal covariance.

    Attributes:
        mean: Mean, (B, latent_channels, H, W), before the scaling factor.
        logvar: Log variance in the shape of `mean`, already clipped to [-30, 20].

    Reference:
        DiagonalGaussianDistribution of Diffusers (PyTorch).
    """

    mean: jax.Array
    logvar: jax.Array

    @property
    def std(self) -> jax.Array:
        """Standard deviation, in the shape of `mean`."""
        return jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> jax.Array:
        """Variance, in the shape of `mean`."""
        return jnp.exp(self.logvar)

    def sample_with(self, noise: jax.Array) -> jax.Array:
        """Return `mean + std * noise`, for standard normal noise in the shape of `mean` that was drawn elsewhere."""
        return self.mean + self.std * noise

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw one sample with a JAX random key."""
        return self.sample_with(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def mode(self) -> jax.Array:
        """Return the most likely value, the mean."""
        return self.mean

    def kl(self) -> jax.Array:
        """Return the KL divergence from the standard normal distribution, summed over all but the batch: (B,)."""
        return 0.5 * jnp.sum(jnp.square(self.mean) + self.var - 1.0 - self.logvar, axis=(1, 2, 3))


@flax.struct.dataclass
class FlaxAutoencoderKLOutput(ModelOutput):
    """Output of the autoencoder's encoder.

    Attributes:
        latent_dist: The posterior over latents.
    """

    latent_dist: FlaxDiagonalGaussianDistribution


@flax.struct.dataclass
class FlaxCLIPTextOutput(ModelOutput):
    """Output of FlaxCLIPTextModel.

    Attributes:
        last_hidden_state: Last hidden state after the final layer norm, (B, L, hidden_size).
        pooler_output: The last hidden state at the end-of-text token, (B, hidden_size).
        hidden_states: Embeddings and every layer's output before the final layer norm, each (B, L, hidden_size); or
            None.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxCLIPTextModelOutput(ModelOutput):
    """Output of FlaxCLIPTextModelWithProjection.

    Attributes:
        text_embeds: Projected pooled output, (B, projection_dim).
        last_hidden_state: Last hidden state after the final layer norm, (B, L, hidden_size).
        hidden_states: Embeddings and every layer's output before the final layer norm, each (B, L, hidden_size); or
            None.
    """

    text_embeds: jax.Array
    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
