"""How long a run is: steps, epochs and batches; and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.rates import learning_rate_schedule


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run's examples divide into steps. Progress is counted in examples, whatever the batch."""

    num_examples: int  # in the dataset
    batch_size: int  # a micro-batch over all devices
    accumulation: int  # micro-batches a step
    total_steps: int  # of the whole run
    limit: str  # what sets their number, for messages

    @property
    def step_examples(self) -> int:
        """Examples an optimizer step."""
        return self.batch_size * self.accumulation

    def ends_epoch(self, seen: int, every: int | None) -> bool:
        """Whether an epoch divisible by `every` ended in the step that brought the examples to `seen`."""
        if every is None:
            return False
        span = every * self.num_examples
        return seen // span > (seen - self.step_examples) // span


def make_schedule(
    config: TrainConfig, num_examples: int, device_count: int, step: int = 0, examples_seen: int = 0
) -> Schedule:
    """Divides the work over steps and devices.

    Args:
        config: Of the run.
        num_examples: In an epoch.
        device_count: Over which a batch is divided.
        step: That the run goes on from.
        examples_seen: Up to that step, in whatever batches.

    Raises:
        ConfigError: If the global batch cannot be divided.
    """
    accumulation = config.gradient_accumulation_steps
    share = device_count * accumulation
    if config.global_batch_size is None:
        micro = config.train_batch_size * device_count
    elif config.global_batch_size % share:
        near = max(1, round(config.global_batch_size / share)) * share
        raise ConfigError(
            f"--global_batch_size {config.global_batch_size}: not divisible over {device_count} devices x "
            f"{accumulation} accumulation steps; the nearest that is: {near}"
        )
    else:
        micro = config.global_batch_size // accumulation
    if config.max_train_steps is not None:
        steps, limit = config.max_train_steps, f"--max_train_steps is {config.max_train_steps}"
    else:
        wanted = config.num_train_epochs * num_examples
        steps = step + max(0, math.ceil((wanted - examples_seen) / (micro * accumulation)))
        limit = f"--num_train_epochs {config.num_train_epochs} are {wanted} examples, of which {examples_seen} are seen"
    return Schedule(
        num_examples=num_examples, batch_size=micro, accumulation=accumulation, total_steps=steps, limit=limit
    )


def make_rate(config: TrainConfig, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate by optimizer step."""
    peak = config.learning_rate * (schedule.step_examples if config.scale_lr else 1)
    return learning_rate_schedule(config, schedule.total_steps, peak)
