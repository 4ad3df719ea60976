"""Learning rate and EMA decays: the numbers that depend only on the step.

They are computed here, once per step, in Python floats, and passed to the train step of either backend. So both
backends use the same digits, a change of schedule compiles nothing anew, and resuming needs only the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

from flax_diffusion.core.checkpoints.power_ema import decay_of, exponent_of
from flax_diffusion.core.config.options import SINGLE_AVERAGE, LrScheduler, TrainConfig
from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.spec.pipeline import PipelineSpec

POLYNOMIAL_END = 1e-7
"""Final rate of the polynomial schedule; Diffusers' default `lr_end`."""


def learning_rate_schedule(config: TrainConfig, total_steps: int, peak: float) -> Callable[[int], float]:
    """Return the learning rate over a run, with the shapes of `diffusers.optimization.get_scheduler`.

    Args:
        config: The options that name the schedule, its warm-up, cycles, power and rules.
        total_steps: Optimizer steps of the whole run, for any number of processes and accumulation steps.
        peak: Learning rate after warm-up.

    Returns:
        A function from optimizer step (0 for the first) to rate. Step 0 of a warm-up has rate 0.

    Raises:
        ConfigError: If `lr_step_rules` cannot be read, or the peak is not above the polynomial's end.
    """
    warmup = config.lr_warmup_steps
    span = max(1, total_steps - warmup)
    kind = config.lr_scheduler
    if kind == "piecewise_constant":
        factor_of = _piecewise(str(config.lr_step_rules))
        return lambda step: peak * factor_of(step)
    if kind == "polynomial" and peak <= POLYNOMIAL_END:
        raise ConfigError(
            f"--learning_rate {peak}: the polynomial schedule ends at {POLYNOMIAL_END}; give a higher rate"
        )

    def factor(step: int) -> float:
        if kind == "constant":
            return 1.0
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / span
        if kind == "constant_with_warmup":
            return 1.0
        if kind == "linear":
            return max(0.0, (total_steps - step) / span)
        if kind == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        if kind == "cosine_with_restarts":
            turn = (config.lr_num_cycles * progress) % 1.0
            return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * turn)))
        if kind != "polynomial":
            raise unknown("lr_scheduler", kind, get_args(LrScheduler))
        left = max(0.0, 1.0 - progress)
        return ((peak - POLYNOMIAL_END) * left**config.lr_power + POLYNOMIAL_END) / peak

    return lambda step: peak * factor(step)


def _piecewise(rules: str) -> Callable[[int], float]:
    """Parse "1:10,0.1:20,0.01": factor 1 before step 10, 0.1 before step 20, and 0.01 from there on."""
    try:
        *parts, last = rules.split(",")
        limits = sorted((int(until), float(value)) for value, until in (part.split(":") for part in parts))
        final = float(last)
        if not all(math.isfinite(value) and value >= 0 for value in (*(value for _, value in limits), final)):
            raise ValueError("a factor is not finite, or is negative")
    except ValueError as error:
        raise ConfigError(
            f"--lr_step_rules {rules!r}: write factor:step pairs and a last factor from 0, e.g. '1:1000,0.1:2000,0.01'"
        ) from error
    return lambda step: next((value for until, value in limits if step < until), final)


def named_rates(spec: PipelineSpec, rate: float) -> dict[str, float]:
    """Return the learning rates of a step to log: `learning_rate`, and where components have their own, each one's.

    Args:
        spec: The pipeline.
        rate: The learning rate without their factors.
    """
    factors = {name: part.rate_factor for name, part in spec.components.items() if part.is_trained}
    if set(factors.values()) <= {1.0}:
        return {"learning_rate": rate}
    return {"learning_rate": rate} | {f"learning_rate_{name}": rate * factor for name, factor in factors.items()}


def ema_decays(config: TrainConfig, step: int) -> dict[str, float]:
    """Compute the decays of the moving averages.

    Args:
        config: The options of the moving averages.
        step: The optimizer step, 0 for the first.

    Returns:
        The decay by name of the average, in the order of `config.averages`. It is 0 at the first step, which copies
        the weights.
    """
    single = [config.ema_max_decay] if config.averages == [SINGLE_AVERAGE] else []
    decays = [_decay(config, step, largest) for largest in config.ema_decays or single]
    decays += [decay_of(exponent_of(sigma_rel), step + 1) for sigma_rel in config.ema_sigma_rels]
    return dict(zip(config.averages, decays, strict=True))


def _decay(config: TrainConfig, step: int, largest: float) -> float:
    """Compute a decay by either rule of Diffusers' `EMAModel`."""
    if step <= 0:
        return 0.0
    if config.ema_warmup:
        decay = 1.0 - (1.0 + step / config.ema_inv_gamma) ** -config.ema_power
    else:
        decay = (1.0 + step) / (10.0 + step)
    return min(decay, largest)
