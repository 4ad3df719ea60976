"""Adam with its moments in the host's memory, fetched to the devices a group at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax

MAX_GROUP_SIZE = 2**23
"""Weights whose moments are fetched together, a hundredth of SD 1.5: fewer need more copies, more take more memory."""


def on_host(state: Any) -> Any:
    """Return an optimizer's state with its arrays on the host; scalars stay on the devices.

    Args:
        state: Tree of `jax.ShapeDtypeStruct` with shardings.
    """

    def move(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not leaf.shape:
            return leaf
        assert leaf.sharding is not None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(move, state)


def from_host(adam: Any) -> optax.GradientTransformationExtraArgs:
    """Return the same transformation, for moments that are on the host when an update starts and when it ends.

    A group of weights is updated after the moments of the group before are back on the host. If the order were left to
    the compiler, it would bring none back before the end, and all new moments would be on the devices at once.

    Args:
        adam: Optax transformation that updates each array by itself, with a state of count, mu and nu.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params
        leaves, tree = jax.tree.flatten(updates)
        moments = list(zip(tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True))
        steps, back, new = [], [], state
        for group in _groups(leaves):
            group_moments: Any = moments[group]
            if back:
                group_moments, back[-1] = jax.lax.optimization_barrier((group_moments, back[-1]))
            mu, nu = map(list, zip(*jax.device_put(group_moments, jax.memory.Space.Device), strict=True))
            group_steps, new = adam.update(leaves[group], type(state)(state.count, mu, nu), **extra)
            steps += group_steps
            back.append(jax.device_put(list(zip(new.mu, new.nu, strict=True)), jax.memory.Space.Host))
        mu, nu = (tree.unflatten(one) for one in zip(*itertools.chain(*back), strict=True))
        return tree.unflatten(steps), type(state)(new.count, mu, nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _groups(leaves: Sequence[jax.Array]) -> Iterator[slice]:
    """Yield runs of neighbouring arrays, each of at most MAX_GROUP_SIZE numbers or of one array."""
    start, size = 0, 0
    for index, leaf in enumerate(leaves):
        if index > start and size + leaf.size > MAX_GROUP_SIZE:
            yield slice(start, index)
            start, size = index, 0
        size += leaf.size
    yield slice(start, len(leaves))
