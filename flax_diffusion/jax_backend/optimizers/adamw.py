"""AdamW, with moments in float32 or in 8 bits.

Reference: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, algorithm 2; `torch.optim.AdamW`.
"""

from __future__ import annotations

import optax

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.jax_backend.optimizers.eight_bit import scale_by_8bit_adam
from flax_diffusion.jax_backend.optimizers.optimizer import OPTIMIZERS, Optimizer


def _scale(config: TrainConfig) -> optax.GradientTransformation:
    scale = scale_by_8bit_adam if config.use_8bit_adam else optax.scale_by_adam
    return scale(b1=config.adam_beta1, b2=config.adam_beta2, eps=config.adam_epsilon)


def _decay(config: TrainConfig) -> optax.GradientTransformation:
    """Decoupled weight decay, which falls on every parameter as in PyTorch."""
    return optax.add_decayed_weights(config.adam_weight_decay)


OPTIMIZERS.register("adamw", Optimizer(scale=_scale, decay=_decay))
