"""What fits a slice, fastest first: batch sizes, meshes and gradient checkpointing tried one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.typed import Checkpointing
from tpu.chips import GIB
from tpu.compiled import DoesNotFit, Plan, make_plan
from tpu.topologies import Slice

LARGEST_BATCH = 64

_WORDS: dict[Checkpointing, str] = {False: "no", "minimal": "minimal", True: "yes"}


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it.

    Attributes:
        batch: Images a device.
        fsdp: Size of the mesh's fsdp axis.
        checkpointing: What is computed again in the backward pass.
        plan: Of the step; the compiler's refusal if it does not fit.
    """

    batch: int
    fsdp: int
    checkpointing: Checkpointing
    plan: Plan | DoesNotFit

    @property
    def seconds(self) -> float:
        """An image and device; infinite if it does not fit."""
        return self.plan.seconds / self.plan.images if isinstance(self.plan, Plan) else float("inf")

    def row(self) -> str:
        """As a line of the table."""
        start = f"{self.batch:6} {self.fsdp:5} {_WORDS[self.checkpointing]:>14}"
        if isinstance(self.plan, DoesNotFit):
            return f"{start} {self.plan.needed:7.2f}   does not fit: {self.plan.available:.2f} GiB"
        rate = len(self.plan.slice.devices) / self.seconds
        accessed = self.plan.accessed / self.plan.images / 1e9
        return (
            f"{start} {self.plan.peak / GIB:7.2f} {self.seconds * 1e3:8.1f} {accessed:8.1f} {rate:9.1f} "
            f"{self.plan.utilization:6.1%}"
        )


def trials(
    config: TrainConfig, where: Slice, plan_of: Callable[[TrainConfig, Slice], Plan] = make_plan
) -> Iterator[Trial]:
    """Tries every setting; of a mesh, batches double until one does not fit.

    Args:
        config: Of the run; its batch sizes, mesh and gradient checkpointing are replaced.
        where: The slice.
        plan_of: Compiles a config's step.
    """
    for fsdp in meshes(len(where.devices)):
        for checkpointing in (False, "minimal", True):
            batch = 1
            while batch <= LARGEST_BATCH:
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


def meshes(devices: int) -> list[int]:
    """Sizes of the fsdp axis worth trying: none, all of a small slice, and powers of four between."""
    return sorted({1, min(devices, 64), *(size for size in (4, 16) if devices % size == 0)})


def table(tried: Iterable[Trial]) -> str:
    """The trials as text, fastest first."""
    head = (
        f"{'batch':>6} {'fsdp':>5} {'checkpointing':>14} {'GiB':>7} {'ms/image':>8} {'GB/image':>8} {'images/s':>9} MFU"
    )
    return "\n".join([f"{head} {'MFU':>6}", *(trial.row() for trial in sorted(tried, key=lambda trial: trial.seconds))])
