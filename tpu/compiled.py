"""Memory, time and costs of a run's step, as the TPU's compiler computes them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.tasks.task import Task, task_of
from tpu import hlo, kernels
from tpu.topologies import Slice

if TYPE_CHECKING:
    from flax_diffusion.core.data.sources.source import Source
    from flax_diffusion.core.spec.pipeline import PipelineSpec
    from flax_diffusion.jax_backend.program import Program


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Costs of one step on one device. Bytes and FLOPs are the compiler's, unless stated otherwise.

    Attributes:
        slice: The chips.
        mesh: Sizes of the mesh's axes.
        size: Height and width of the pictures, in pixels.
        images: Images per device and step.
        state: Bytes of each kind of array that exists before the step, by shapes and shardings, without padding.
        arguments: Bytes of all these arrays, with padding.
        temporaries: Bytes of gradients, activations and other arrays that live only during the step.
        code: Bytes of the program.
        peak: Largest number of bytes in use: arguments, outputs that are not written over them, temporaries and code.
        host: Bytes that stay in the host's memory.
        flops: FLOPs per step. Where a loop runs over micro-batches, the compiler counts its body once, and this is that
            count times the micro-batches: the update, counted as often, is under a thousandth of it.
        accessed: Bytes read and written per step; None where a loop runs over micro-batches.
        compile_seconds: Seconds that this machine took to trace and compile the step.
        operations: All scheduled operations.
    """

    slice: Slice
    mesh: Mapping[str, int]
    size: tuple[int, int]
    images: float
    state: Mapping[str, int]
    arguments: int
    temporaries: int
    code: int
    peak: int
    host: int
    flops: float
    accessed: float | None
    compile_seconds: float
    operations: list[hlo.Operation] = field(repr=False)

    @property
    def seconds(self) -> float:
        """Seconds per step, without exchanges between chips."""
        return sum(map(self.seconds_of, self.operations))

    def seconds_of(self, operation: hlo.Operation) -> float:
        """Return the seconds of an operation, from the compiler's estimated cycles or, for a kernel, `tpu.kernels`."""
        if operation.kernel is None:
            return operation.cycles / self.slice.chip.clock
        one = kernels.seconds(operation.kernel, self.slice.chip)
        return operation.count * (one or 0.0)

    @property
    def kernel_seconds(self) -> float:
        """Seconds per step in kernels, which are computed from their FLOPs and bytes."""
        return sum(self.seconds_of(operation) for operation in self.operations if operation.kernel)

    @property
    def uncounted(self) -> list[str]:
        """Names of kernels that state no costs, so that their time is not known."""
        chip = self.slice.chip
        found = {one.kernel for one in self.operations if one.kernel and kernels.seconds(one.kernel, chip) is None}
        return sorted({kernel.name for kernel in found})

    @property
    def capacity(self) -> float:
        """Bytes of memory per device."""
        return self.slice.chip.hbm_bytes

    @property
    def utilization(self) -> float:
        """FLOPs of the step, divided by those that the device could do in the same time (MFU)."""
        return self.flops / self.seconds / self.slice.chip.flops

    @property
    def exchanged(self) -> int:
        """Bytes per device and step in the results of exchanges; for an all-reduce, those of what is reduced."""
        return sum(operation.bytes_exchanged for operation in self.operations)


def sizes_of(config: TrainConfig) -> list[tuple[int, int]]:
    """Return the sizes of pictures that a run trains at, each with a program of its own, the largest first.

    Args:
        config: Options of the run.

    Returns:
        Heights and widths, in pixels.

    Raises:
        UserError: For buckets that the pipeline does not take.
    """
    from flax_diffusion.core.data.buckets import parse_sizes

    if not config.bucket_resolutions:
        return [(config.resolution, config.resolution)]
    task = task_of(config)
    factor = task.make_spec(task.described_source()).size_factor
    sizes = parse_sizes(config.bucket_resolutions, config.resolution, factor)
    return sorted(sizes, key=lambda size: -size[0] * size[1])


def make_plan(
    config: TrainConfig, where: Slice, text_to: Path | None = None, size: tuple[int, int] | None = None
) -> Plan:
    """Compile a run's step for a slice.

    Args:
        config: Options of the run. No data are read, and no weights, only the configs of the models.
        where: The slice.
        text_to: File for the text of the compiled program; None for none.
        size: Height and width of the pictures, one of `sizes_of`; None for the largest.

    Returns:
        The costs of the step.

    Raises:
        UserError: For a config that cannot be run there.
        DoesNotFit: If the compiler refuses the step because of its memory.
    """
    import jax

    from flax_diffusion.jax_backend.program import Program
    from flax_diffusion.jax_backend.sharding import make_mesh

    task, size = task_of(config), size or sizes_of(config)[0]
    source = task.described_source()
    spec = task.make_spec(source)
    mesh = make_mesh(config.data_parallelism, config.fsdp_parallelism, where.devices)
    program = Program(config, spec, mesh)
    schedule = make_schedule(config, len(source), mesh.size)
    frozen, example = described(task, spec, source, program, size)
    pairs = task.rows_per_example
    batch = program.batch(example, schedule.accumulation, schedule.batch_size * pairs)
    started = time.monotonic()
    try:
        compiled = program.step.lower(program.state, frozen, batch, program.rates).compile()
    except jax.errors.JaxRuntimeError as error:
        raise refusal(error, config, mesh.size) from error
    compile_seconds, text = time.monotonic() - started, compiled.as_text()
    if text_to is not None:
        text_to.write_text(text)
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    looped = schedule.accumulation > 1 and schedule.accumulation in hlo.loops(text)
    micro_batches = schedule.accumulation if looped else 1
    state = program.state
    kinds = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "frozen weights": frozen,
        "batch": batch,
    }
    return Plan(
        slice=where,
        mesh=dict(mesh.shape),
        size=size,
        images=schedule.step_examples * pairs / mesh.size,
        state={kind: bytes_per_device(tree) for kind, tree in kinds.items()},
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        flops=costs["flops"] * micro_batches,
        accessed=costs["bytes accessed"] if micro_batches == 1 else None,
        compile_seconds=compile_seconds,
        operations=hlo.operations(text),
    )


def described(
    task: Task[TrainConfig], spec: PipelineSpec, source: Source, program: Program, size: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what a step takes beside its state, with zeros for what a run computes before training.

    Args:
        task: The task of the run.
        spec: Its pipeline.
        source: A source of at least one picture, which is not read where latents are computed before.
        program: Its program.
        size: Height and width of the pictures, in pixels.

    Returns:
        The descriptions of the frozen weights that the step reads, by component, and the arrays of one example.
    """
    import jax

    from flax_diffusion.core.data.batches import Precomputed
    from flax_diffusion.core.data.images.transforms import sized_name
    from flax_diffusion.core.families.family import Role

    frozen, made = dict(program.frozen), Precomputed()
    if task.embeds_prompts:
        assert spec.tokenize is not None
        encoders = {name: frozen.pop(name) for name in spec.names_of(Role.TEXT_ENCODER)}
        told = jax.eval_shape(program.modules.condition, encoders, spec.tokenize.stacked([""]))
        zeros = {name: np.zeros(told[name].shape[1:], np.float32) for name in spec.family.prompt_arrays}
        prompts = ("", str(source[0].caption))
        made = replace(made, embeddings={name: dict.fromkeys(prompts, array) for name, array in zeros.items()})
    if task.caches_latents:
        latents = (spec.sample_shape[0], *(side // spec.vae_factor for side in size))
        made = replace(made, posteriors={sized_name(source[0].name, size): np.zeros((2, 2, *latents), np.float32)})
        del frozen[spec.vae_name]
    return frozen, task.make_example_fn(spec, made)(source, 0, 0, 0, size)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes per device of a tree of described arrays, without those in the host's memory."""
    import jax

    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind != "pinned_host"
    )


class DoesNotFit(ConfigError):
    """The compiler's refusal of a program that needs more memory than a device has.

    Attributes:
        needed: GiB per device that the step needs.
        available: GiB that a device has.
    """

    def __init__(self, needed: float, available: float, fixes: Sequence[str]):
        self.needed, self.available = needed, available
        super().__init__(
            f"does not fit: the step needs {needed:.2f} GiB of a device's {available:.2f}, "
            f"{needed - available:.2f} too many. What helps: {', '.join(fixes)}"
        )


_NEEDED = (
    re.compile(r"Used (?P<needed>[\d.]+)(?P<unit>[KMGT]) of (?P<available>[\d.]+)G hbm"),
    re.compile(r"\((?P<needed>[\d.]+)(?P<unit>[KMGT])\) exceeds available HBM \((?P<available>[\d.]+)G\)"),
)


_GIB = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}


def refusal(error: Exception, config: TrainConfig, devices: int) -> Exception:
    """Return the error for a compiler's error of missing memory, with ways to save some; return others as they are.

    Args:
        error: Error of the compiler.
        config: Options of the run.
        devices: Number of devices in the slice.
    """
    found = next(filter(None, (pattern.search(str(error)) for pattern in _NEEDED)), None)
    if found is None:
        return error
    fixes = {
        "--mixed_precision bf16": config.mixed_precision == "no",
        "--gradient_checkpointing": config.gradient_checkpointing is not True,
        f"--fsdp_parallelism {devices}": config.fsdp_parallelism < devices,
        "a lower --train_batch_size, with --gradient_accumulation_steps": True,
        "a slice of more chips or of larger ones": True,
    }
    needed = float(found["needed"]) * _GIB[found["unit"]]
    return DoesNotFit(needed, float(found["available"]), [fix for fix, helps in fixes.items() if helps])
