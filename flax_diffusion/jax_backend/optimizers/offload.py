"""Adam's moments in the host's memory, from where they visit the devices a few at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax

AT_ONCE = 2**23
"""Weights whose moments are fetched together, a hundredth of SD 1.5: fewer make more copies, more take more room."""


def on_host(state: Any) -> Any:
    """An optimizer's state, given by shapes and shardings, with its arrays at the host. Scalars stay on the devices."""

    def move(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not leaf.shape:
            return leaf
        assert leaf.sharding is not None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(move, state)


def from_host(adam: Any) -> optax.GradientTransformationExtraArgs:
    """The same transformation, of moments that are at the host when an update starts and when it ends.

    A group of weights is updated after the moments of the one before are back. Were the order left to the compiler, it
    would bring none back before the end, and all new moments would stand on the devices.

    Args:
        adam: An optax transformation of each array by itself; its state is made of count, mu and nu.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del params
        leaves, tree = jax.tree.flatten(updates)
        moments = list(zip(tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True))
        steps, back, new = [], [], state
        for group in _groups(leaves):
            fetched: Any = moments[group]
            if back:
                fetched, back[-1] = jax.lax.optimization_barrier((fetched, back[-1]))
            mu, nu = map(list, zip(*jax.device_put(fetched, jax.memory.Space.Device), strict=True))
            made, new = adam.update(leaves[group], type(state)(state.count, mu, nu), **extra)
            steps += made
            back.append(jax.device_put(list(zip(new.mu, new.nu, strict=True)), jax.memory.Space.Host))
        mu, nu = (tree.unflatten(one) for one in zip(*itertools.chain(*back), strict=True))
        return tree.unflatten(steps), type(state)(new.count, mu, nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _groups(leaves: Sequence[jax.Array]) -> Iterator[slice]:
    """Runs of neighbours, as long as they hold AT_ONCE numbers or are one array."""
    start, held = 0, 0
    for index, leaf in enumerate(leaves):
        if index > start and held + leaf.size > AT_ONCE:
            yield slice(start, index)
            start, held = index, 0
        held += leaf.size
    yield slice(start, len(leaves))
