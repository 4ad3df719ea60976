"""Outputs of the models: dataclasses that jit passes through and that, as upstream's, index like tuples."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self

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
class FlaxTransformer2DModelOutput(ModelOutput):
    """Output of FlaxDiTTransformer2DModel.

    Attributes:
        sample: Prediction, (B, out_channels, H, W), in the model's dtype.
    """

    sample: jax.Array


@flax.struct.dataclass
class FlaxControlNetOutput(ModelOutput):
    """Output of FlaxControlNetModel: what the UNet adds to its own.

    Attributes:
        down_block_res_samples: One for each skip connection of the UNet, each (B, H', W', C).
        mid_block_res_sample: For the mid block's output, (B, H', W', C).
    """

    down_block_res_samples: tuple[jax.Array, ...]
    mid_block_res_sample: jax.Array


@flax.struct.dataclass
class FlaxDecoderOutput(ModelOutput):
    """Output of the autoencoder's decoder.

    Attributes:
        sample: Images in [-1, 1], (B, out_channels, H, W).
    """

    sample: jax.Array


@jax.tree_util.register_pytree_node_class
class FlaxDiagonalGaussianDistribution:
    """The autoencoder's posterior, a Gaussian with diagonal covariance.

    Attributes:
        mean: Mean, (B, h, w, C).
        logvar: Log variance in the shape of `mean`, clipped to [-30, 20].

    Args:
        parameters: Mean and log variance one after the other along the last axis, (B, h, w, 2·C), before the scaling
            factor.
        deterministic: Have no variance: `sample` returns the mean, and `kl` and `nll` are zero.

    Reference:
        DiagonalGaussianDistribution of Diffusers (PyTorch), channels last.
    """

    def __init__(self, parameters: jax.Array, deterministic: bool = False):
        mean, logvar = jnp.split(parameters, 2, axis=-1)
        self.mean, self.logvar, self.deterministic = mean, jnp.clip(logvar, -30.0, 20.0), deterministic

    @classmethod
    def of(cls, mean: jax.Array, logvar: jax.Array, deterministic: bool = False) -> Self:
        """Return the distribution of a mean and a log variance of one shape, with the channels on any axis.

        Args:
            mean: Mean, (B, …).
            logvar: Log variance, clipped already.
            deterministic: Have no variance.
        """
        made = object.__new__(cls)
        made.mean, made.logvar, made.deterministic = mean, logvar, deterministic
        return made

    def tree_flatten(self) -> tuple[tuple[jax.Array, jax.Array], bool]:
        """Return the arrays, and what is static, as JAX asks of a pytree."""
        return (self.mean, self.logvar), self.deterministic

    @classmethod
    def tree_unflatten(cls, deterministic: bool, arrays: tuple[jax.Array, jax.Array]) -> Self:
        """Return the distribution of what `tree_flatten` returned.

        Args:
            deterministic: What is static.
            arrays: Mean and log variance.
        """
        return cls.of(*arrays, deterministic)

    @property
    def std(self) -> jax.Array:
        """Standard deviation, in the shape of `mean`."""
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(0.5 * self.logvar)

    @property
    def var(self) -> jax.Array:
        """Variance, in the shape of `mean`."""
        return jnp.zeros_like(self.mean) if self.deterministic else jnp.exp(self.logvar)

    def sample_with(self, noise: jax.Array) -> jax.Array:
        """Return `mean + std * noise`, for standard normal noise in the shape of `mean` that was drawn elsewhere."""
        return self.mean + self.std * noise

    def sample(self, key: jax.Array) -> jax.Array:
        """Draw one sample with a JAX random key, in float32 at least."""
        return self.sample_with(jax.random.normal(key, self.mean.shape))

    def mode(self) -> jax.Array:
        """Return the most likely value, the mean."""
        return self.mean

    def kl(self, other: Self | None = None) -> jax.Array:
        """Return the KL divergence from another distribution, summed over all axes but the first: (B,).

        Args:
            other: The other distribution; None for the standard normal one.
        """
        if self.deterministic:
            return jnp.zeros((1,))
        if other is None:
            return 0.5 * jnp.sum(jnp.square(self.mean) + self.var - 1.0 - self.logvar, axis=(1, 2, 3))
        square = jnp.square(self.mean - other.mean) / other.var
        return 0.5 * jnp.sum(square + self.var / other.var - 1.0 - self.logvar + other.logvar, axis=(1, 2, 3))

    def nll(self, sample: jax.Array, axis: Sequence[int] = (1, 2, 3)) -> jax.Array:
        """Return the negative log likelihood of a sample, in nats, summed over axes.

        Args:
            sample: Sample in the shape of `mean`.
            axis: Axes to sum over.
        """
        if self.deterministic:
            return jnp.zeros((1,))
        square = jnp.square(sample - self.mean) / self.var
        return 0.5 * jnp.sum(math.log(2 * math.pi) + self.logvar + square, axis=tuple(axis))


@flax.struct.dataclass
class FlaxAutoencoderKLOutput(ModelOutput):
    """Output of the autoencoder's encoder.

    Attributes:
        latent_dist: The posterior over latents, channels last.
    """

    latent_dist: FlaxDiagonalGaussianDistribution
