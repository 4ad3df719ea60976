"""Search for the fastest settings that fit a slice, over batch sizes, fsdp_sizes and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.typed import Checkpointing
from tpu.chips import GIB
from tpu.compiled import DoesNotFit, Plan, make_plan
from tpu.topologies import Slice

MAX_BATCH = 64

_CHECKPOINTING_LABELS: dict[Checkpointing, str] = {False: "no", "minimal": "minimal", True: "yes"}


@dataclass(frozen=True)
class Trial:
    """One setting and its result.

    Attributes:
        batch: Images per device in one forward pass.
        fsdp: Size of the mesh's fsdp axis.
        checkpointing: What the backward pass computes again.
        plan: Plan of the step, or the compiler's error if it does not fit.
    """

    batch: int
    fsdp: int
    checkpointing: Checkpointing
    plan: Plan | DoesNotFit

    @property
    def seconds(self) -> float:
        """Seconds per image and device; infinite if the step does not fit."""
        return self.plan.seconds / self.plan.images if isinstance(self.plan, Plan) else float("inf")

    def row(self) -> str:
        """Return the trial as a line of the table."""
        start = f"{self.batch:6} {self.fsdp:5} {_CHECKPOINTING_LABELS[self.checkpointing]:>14}"
        if isinstance(self.plan, DoesNotFit):
            return f"{start} {self.plan.needed:7.2f}   does not fit: {self.plan.available:.2f} GiB"
        rate = len(self.plan.slice.devices) / self.seconds
        accessed = "" if self.plan.accessed is None else f"{self.plan.accessed / self.plan.images / 1e9:.1f}"
        return (
            f"{start} {self.plan.peak / GIB:7.2f} {self.seconds * 1e3:8.1f} {accessed:>8} {rate:9.1f} "
            f"{self.plan.utilization:6.1%}"
        )


def trials(
    config: TrainConfig, where: Slice, plan_of: Callable[[TrainConfig, Slice], Plan] = make_plan
) -> Iterator[Trial]:
    """Yield a trial of every setting; for each mesh and checkpointing, the batch doubles until it does not fit.

    Args:
        config: The run's options; batch sizes, mesh and gradient checkpointing are replaced.
        where: The slice to plan for.
        plan_of: Function that compiles the step of a config for a slice and returns its plan.
    """
    for fsdp in fsdp_sizes(len(where.devices)):
        for checkpointing in (False, "minimal", True):
            batch = 1
            while batch <= MAX_BATCH:
                setting = {"train_batch_size": batch, "global_batch_size": None, "data_parallelism": -1}
                setting |= {"fsdp_parallelism": fsdp, "gradient_checkpointing": checkpointing}
                try:
                    plan: Plan | DoesNotFit = plan_of(config.model_copy(update=setting), where)
                except DoesNotFit as error:
                    plan = error
                yield Trial(batch, fsdp, checkpointing, plan)
                if isinstance(plan, DoesNotFit):
                    break
                batch *= 2


def fsdp_sizes(devices: int) -> list[int]:
    """Return the sizes of the fsdp axis worth trying: 1, all of a small slice, and powers of four between."""
    return sorted({1, min(devices, 64), *(size for size in (4, 16) if devices % size == 0)})


def table(tried: Iterable[Trial]) -> str:
    """Return the trials as a text table, fastest first."""
    head = (
        f"{'batch':>6} {'fsdp':>5} {'checkpointing':>14} {'GiB':>7} {'ms/image':>8} {'GB/image':>8} {'images/s':>9} MFU"
    )
    return "\n".join([f"{head} {'MFU':>6}", *(trial.row() for trial in sorted(tried, key=lambda trial: trial.seconds))])
