"""Dropout whose masks do not depend on the devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw which elements are kept; True with probability 1 - rate.

    Inside `jax.shard_map`, where an array holds one device's images, it is that device's part of the mask of all
    images: a run draws the same masks on any number of devices.

    Args:
        key: Key of the mask.
        rate: Probability of an element to be dropped.
        shape: Shape of the array, (B, …).

    Returns:
        Booleans of that shape.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return jax.random.bernoulli(key, 1 - rate, shape)
    mask = jax.random.bernoulli(key, 1 - rate, (shape[0] * mesh.size, *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(mask, jax.lax.axis_index(mesh.axis_names) * shape[0], shape[0])


def drop(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Set elements of an array (B, …) to zero at random, and divide the others by the part that is kept."""
    return jnp.where(keep_mask(key, rate, x.shape), x / (1 - rate), 0)


class Dropout(nn.Module):
    """Layer of `drop`, with a key of the stream "dropout".

    Attributes:
        rate: Probability of an element to be dropped.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Return an array (B, …) with elements dropped; as it is where deterministic."""
        return x if deterministic or self.rate == 0 else drop(x, self.make_rng("dropout"), self.rate)
