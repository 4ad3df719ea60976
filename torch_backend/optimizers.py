"""Optimizers of PyTorch, by the value of --optimizer; the twin of `flax_diffusion.jax_backend.optimizers`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.registry import Registry
from torch_backend.families.family import GROUP

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer.

    Attributes:
        make: Makes it, of the options and of groups of parameters; the learning rate is set at every step.
        state: Returns, of the options, PyTorch's name of each tensor that the optimizer keeps for a parameter, and its
            name in checkpoints, which is that of the JAX side's state. Each is shaped as the parameter.
    """

    make: Callable[[TrainConfig, Groups], torch.optim.Optimizer]
    state: Callable[[TrainConfig], Mapping[str, str]]


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", [], GROUP)
"""All optimizers by name."""


def make_optimizer(
    config: TrainConfig, parameters: Iterable[tuple[str, Tensor]], rate_factors: Mapping[str, float]
) -> torch.optim.Optimizer:
    """Make the optimizer of a run.

    Args:
        config: The run's options.
        parameters: By name, which begins with that of the component.
        rate_factors: Of the learning rate of each component.
    """
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in parameters:
        groups.setdefault(rate_factors[name.partition(".")[0]], []).append(parameter)
    listed: Groups = [{"params": group, "rate_factor": factor} for factor, group in groups.items()]
    return OPTIMIZERS[config.optimizer].make(config, listed)


def _adamw(config: TrainConfig, groups: Groups) -> torch.optim.Optimizer:
    kind: Any = torch.optim.AdamW
    if config.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit  # pyright: ignore[reportPrivateImportUsage]
    return kind(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def _adamw_state(config: TrainConfig) -> Mapping[str, str]:
    """Return the names of the moments. 8-bit moments have a form of bitsandbytes' own, and keep its names."""
    if config.use_8bit_adam:
        return {"state1": "state1", "state2": "state2"}
    return {"exp_avg": "mu", "exp_avg_sq": "nu"}


OPTIMIZERS.register("adamw", Optimizer(make=_adamw, state=_adamw_state))
