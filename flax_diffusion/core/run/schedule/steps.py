"""The length of a run in steps, epochs and batches, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.config.profiling import profile_range
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.schedule.rates import learning_rate_schedule


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Division of a run's examples into steps. Progress is counted in examples, for any batch size.

    Attributes:
        num_examples: Examples per epoch.
        batch_size: Examples per micro-batch, over all devices.
        accumulation: Micro-batches per optimizer step.
        total_steps: Optimizer steps of the whole run.
        limit: What sets `total_steps`, for messages.
    """

    num_examples: int
    batch_size: int
    accumulation: int
    total_steps: int
    limit: str

    @property
    def step_examples(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.accumulation

    def ends_epoch(self, seen: int, every: int | None) -> bool:
        """Return whether a step ends an epoch whose number is divisible by `every`.

        Args:
            seen: Examples used up to the end of the step.
            every: Number of epochs; None for never.
        """
        if every is None:
            return False
        span = every * self.num_examples
        return seen // span > (seen - self.step_examples) // span


def micro_batch_size(config: TrainConfig, device_count: int) -> int:
    """Return the examples of a micro-batch over all devices, of which one may be several images.

    Args:
        config: Options of the run.
        device_count: Number of devices.
    """
    if config.global_batch_size is None:
        return config.train_batch_size * device_count
    return config.global_batch_size // config.gradient_accumulation_steps


def make_schedule(
    config: TrainConfig, num_examples: int, device_count: int, step: int = 0, examples_seen: int = 0
) -> Schedule:
    """Divide a run's examples over steps and devices.

    Args:
        config: Options of the run.
        num_examples: Examples per epoch.
        device_count: Number of devices, over which a batch is divided.
        step: The step that the run resumes from.
        examples_seen: Examples used up to that step, in batches of any size.

    Raises:
        ConfigError: If the global batch cannot be divided, or no such step is taken as is to be recorded.
    """
    accumulation = config.gradient_accumulation_steps
    share = device_count * accumulation
    if config.global_batch_size is not None and config.global_batch_size % share:
        near = max(1, round(config.global_batch_size / share)) * share
        raise ConfigError(
            f"--global_batch_size {config.global_batch_size}: not divisible over {device_count} devices x "
            f"{accumulation} accumulation steps; the nearest that is: {near}"
        )
    micro = micro_batch_size(config, device_count)
    if config.max_train_steps is not None:
        steps, limit = config.max_train_steps, f"--max_train_steps is {config.max_train_steps}"
    else:
        wanted = config.num_train_epochs * num_examples
        steps = step + max(0, math.ceil((wanted - examples_seen) / (micro * accumulation)))
        limit = f"--num_train_epochs {config.num_train_epochs} are {wanted} examples, of which {examples_seen} are seen"
    recorded = profile_range(config.profile_steps)
    if recorded is not None and recorded[1] > steps:
        raise ConfigError(f"--profile_steps {config.profile_steps}: the run ends after step {steps}; name steps before")
    return Schedule(
        num_examples=num_examples, batch_size=micro, accumulation=accumulation, total_steps=steps, limit=limit
    )


def make_rate(config: TrainConfig, schedule: Schedule) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step, 0 for the first."""
    peak = config.learning_rate * (schedule.step_examples if config.scale_lr else 1)
    return learning_rate_schedule(config, schedule.total_steps, peak)
