"""Dropout whose masks do not depend on the devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw which elements are kept; True with probability 1 - rate.

    Each image of the batch has a key of its own, of its place among the images of all devices: a run draws the same
    masks on any number of devices, and inside `jax.shard_map` each device draws those of its own images alone.

    Args:
        key: Key of the mask.
        rate: Probability of an element to be dropped.
        shape: Shape of the array, (B, …).

    Returns:
        Booleans of that shape.
    """
    mesh = jax.sharding.get_abstract_mesh()
    first = jax.lax.axis_index(mesh.axis_names) * shape[0] if mesh.manual_axes else 0
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape[1:]))(keys)


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
