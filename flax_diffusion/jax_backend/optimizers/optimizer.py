"""The table of optimizers; gradient clipping, the moving average and fp16 loss scaling, as PyTorch computes them.

Learning rate and EMA decays are arguments of the step (see `core.rates`), so no schedule is compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

from flax_diffusion.core.backend import MIN_LOSS_SCALE
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.registry import Registry
from flax_diffusion.jax_backend.families.family import GROUP
from flax_diffusion.jax_backend.optimizers.offload import from_host

Params = Any
"""A tree of arrays."""

CLIP_EPSILON = 1e-6
"""Added to the norm by `torch.nn.utils.clip_grad_norm_`, and so by Diffusers' scripts."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer, up to the learning rate: the step subtracts the rate times the update.

    Attributes:
        scale: Makes, of the options, the transformation that has the state: a named tuple of `count` and of trees
            that are shaped as the parameters. Checkpoints name the state by these fields.
        decay: Makes, of the options, a transformation without a state that comes after it.
    """

    scale: Callable[[TrainConfig], optax.GradientTransformation]
    decay: Callable[[TrainConfig], optax.GradientTransformation] = lambda config: optax.identity()


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", ["flax_diffusion.jax_backend.optimizers"], GROUP)
"""All optimizers, by the value of --optimizer."""


def make_optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Make the optimizer of a run.

    Its `update` takes `finite`: where that is given and False, the state stays as it was.

    Args:
        config: The run's options, which also say whether the state is in the host's memory.
    """
    chosen = OPTIMIZERS[config.optimizer]
    scale = _skipping(chosen.scale(config))
    return optax.chain(from_host(scale) if config.offload_optimizer else scale, chosen.decay(config))


def where_finite(finite: jax.Array | None, after: Any, before: Any) -> Any:
    """Return a tree as it is after a step, or as it was before a step that is not finite; None does not ask."""
    return after if finite is None else jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)


def _skipping(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, finite: jax.Array | None = None, **_: Any) -> Any:
        updates, new = inner.update(updates, state, params)
        return updates, where_finite(finite, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def clip_by_global_norm(grads: Params, max_norm: float) -> tuple[Params, jax.Array]:
    """Scale gradients to a global norm of at most `max_norm`.

    Returns:
        The gradients times min(1, max_norm / (norm + 1e-6)), and the norm before.

    Reference:
        `torch.nn.utils.clip_grad_norm_`; optax's own differs in the last digits.
    """
    norm = optax.tree.norm(grads)
    factor = jnp.minimum(1.0, max_norm / (norm + CLIP_EPSILON))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm


def update_ema(ema: Params, params: Params, decay: jax.Array) -> Params:
    """Return the next moving average, ema − (1 − decay) · (ema − params)."""
    return jax.tree.map(lambda e, p: e - (1.0 - decay).astype(e.dtype) * (e - p), ema, params)


class LossScale(struct.PyTreeNode):
    """Dynamic loss scale of fp16 training, with the constants of `torch.amp.GradScaler`.

    Reference:
        Micikevicius et al., https://arxiv.org/abs/1710.03740, section 3.2.
    """

    scale: jax.Array
    good_steps: jax.Array

    GROWTH_INTERVAL: ClassVar[int] = 2000
    GROWTH: ClassVar[float] = 2.0
    BACKOFF: ClassVar[float] = 0.5

    @classmethod
    def create(cls) -> LossScale:
        """Return the scale that a run starts with, 65536."""
        return cls(scale=jnp.float32(65536.0), good_steps=jnp.int32(0))

    def update(self, finite: jax.Array) -> LossScale:
        """Halve the scale, down to 1, after a step whose gradients overflowed; double it after 2000 good steps."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good == self.GROWTH_INTERVAL
        factor = jnp.where(finite, jnp.where(grow, self.GROWTH, 1.0), self.BACKOFF)
        scale = jnp.maximum(self.scale * factor, MIN_LOSS_SCALE)
        return LossScale(scale=scale, good_steps=jnp.where(grow, 0, good))
