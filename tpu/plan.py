"""Memory and speed of a run on TPUs: `python -m tpu.plan --config FILE --topology v5e:2x2 [flags of train]`.

It compiles the step that `flax_diffusion.train` runs, for TPUs that this machine does not have and with weights and
pictures that are only described, and prints the memory and time that the compiler computes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.images.transforms import shown_size
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.family import FAMILIES, Role
from flax_diffusion.core.tasks.task import Task
from tpu import topologies
from tpu.chips import GIB
from tpu.compiled import Plan, make_plan, sizes_of


def without_data(task: type[Task[Any]], values: dict[str, Any]) -> dict[str, Any]:
    """Add options that name data where they are not given, because a plan reads no data.

    Args:
        task: Class of the task.
        values: The given options, by field.

    Returns:
        All options, by field.
    """
    return task.stand_ins(values) | values


def report(plan: Plan, top: int = 10) -> str:
    """Format a plan as text.

    Args:
        plan: The plan.
        top: Number of operations to list.
    """
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"{plan.slice.chip.name}, {len(plan.slice.devices)} chips, {mesh}: {plan.images:g} images of "
        f"{shown_size(plan.size)} per device and step",
        "",
        f"{'memory per device':24} {'GiB':>8}",
    ]
    padded = plan.arguments - sum(plan.state.values())
    rows = dict(plan.state) | {"padding": padded, "gradients, activations": plan.temporaries, "program": plan.code}
    lines += [f"  {kind:22} {amount / GIB:8.3f}" for kind, amount in rows.items() if amount]
    fits = "fits" if plan.peak <= plan.capacity else "does not fit"
    lines += [f"  {'peak':22} {plan.peak / GIB:8.3f}   of {plan.capacity / GIB:.0f}: {fits}"]
    lines += [f"  {'on the host':22} {plan.host / GIB:8.3f}"] if plan.host else []
    count, devices = plan.images, len(plan.slice.devices)
    teraflops = plan.flops / 1e12
    lines += [
        "",
        f"{'time of a step':24} {plan.seconds * 1e3:8.1f} ms estimated, {plan.seconds / count * 1e3:.3g} per image; "
        "exchanges between chips are not included",
        f"{'images per second':24} {count / plan.seconds:8.1f} per device, {devices * count / plan.seconds:.0f} in all",
        f"{'FLOPs':24} {teraflops:8.3g} T, {teraflops / count:.3g} T per image, MFU {plan.utilization:.1%}",
        *_accessed(plan),
        f"{'exchanged':24} {plan.exchanged / 1e9:8.3f} GB per device",
        f"{'compiled in':24} {plan.compile_seconds:8.0f} s",
        "",
        f"{'by part':24} {'ms':>8}",
    ]
    parts: Counter[str] = Counter()
    for operation in plan.operations:
        parts[part_of(operation.module)] += plan.seconds_of(operation) * 1e3  # pyright: ignore[reportArgumentType]
    lines += [f"  {part:22} {spent:8.1f}" for part, spent in parts.most_common()]
    if plan.kernel_seconds:
        lines += [f"  {plan.kernel_seconds * 1e3:.1f} of these in kernels, computed from their FLOPs and bytes"]
    if plan.uncounted:
        lines += [f"  not included, since their cost is not known: {', '.join(plan.uncounted)}"]
    lines += ["", f"the {top} costliest operations"]
    costliest = sorted(plan.operations, key=lambda one: -plan.seconds_of(one))[:top]
    lines += [
        f"  {plan.seconds_of(one) * 1e3:8.2f} ms  {one.opcode:12} {one.module or one.name}"
        + (f" x {one.count}" if one.count > 1 else "")
        for one in costliest
    ]
    return "\n".join(lines)


def _accessed(plan: Plan) -> list[str]:
    if plan.accessed is None:
        return []
    return [f"{'memory accessed':24} {plan.accessed / 1e9:8.1f} GB, {plan.accessed / plan.images / 1e9:.3g} per image"]


def table(plans: Sequence[Plan]) -> str:
    """Format the plans of a run's sizes as a table.

    Args:
        plans: A plan for each size.
    """
    lines = [f"{'pictures':>12} {'GiB':>7} {'ms/image':>9} {'MFU':>6}"]
    lines += [
        f"{shown_size(plan.size):>12} {plan.peak / GIB:7.2f} {plan.seconds / plan.images * 1e3:9.1f} "
        f"{plan.utilization:6.1%}"
        for plan in plans
    ]
    return "\n".join(lines)


def part_of(module: str) -> str:
    """Return the part of the pipeline that a layer belongs to, for the sums by part.

    Args:
        module: Path of the layer in the program.
    """
    from flax_diffusion.jax_backend.families.family import FAMILIES as FLAX_FAMILIES

    flax = {name: kind.__name__ for family in FLAX_FAMILIES.values() for name, kind in family.classes.items()}
    models = {model.name: model.role for family in FAMILIES.values() for model in family.models.values()}
    role = next((role for name, role in models.items() if name in module or flax.get(name, name) in module), None)
    if role in (Role.TEXT_ENCODER, Role.AUTOENCODER, Role.CONTROL):
        return str(role)
    for part, words in _PARTS.items():
        if any(word in module for word in words):
            return part
    if role is Role.DENOISER:
        return "rest of the denoiser"
    return "optimizer and the rest"


_PARTS = {"feed-forward": ("/ff/",), "attention": ("attn", "attention"), "resnets": ("resnets",)}
"""Words in the paths of a part's layers; the first part that matches decides, as a transformer is in `attentions_0`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    words = list(sys.argv[1:] if argv is None else argv)
    own = command_line.Parser(prog="python -m tpu.plan", add_help=False)
    own.add_argument("--topology", default="v5e:2x2")
    result = own.add_mutually_exclusive_group()
    result.add_argument("--sweep", action="store_true")
    result.add_argument("--hlo", type=Path)
    if {"-h", "--help"} & set(words):
        sys.stdout.write(_HELP)
        return
    options, rest = own.parse_known_args(words)
    _, config = command_line.parse_train(rest, "python -m tpu.plan", without_data)
    topologies.set_environment()
    where = topologies.describe(options.topology)
    if options.hlo:
        try:
            options.hlo.touch()
        except OSError as error:
            raise ConfigError(
                f"--hlo {options.hlo}: cannot be written ({error.strerror}); name a file in a folder that exists"
            ) from error
    if options.sweep:
        from tpu import sweep

        tried = []
        for trial in sweep.trials(config, where):
            sys.stderr.write(trial.row() + "\n")
            tried.append(trial)
        sys.stdout.write(sweep.table(tried) + "\n")
        return
    sizes = sizes_of(config)
    plans = [make_plan(config, where, options.hlo, sizes[0])]
    sys.stdout.write(report(plans[0]) + "\n")
    if len(sizes) > 1:  # a program is compiled for each, which takes minutes where the model is large
        sys.stdout.write(f"\nthe other sizes of --bucket_resolutions, {len(sizes) - 1} more programs to compile\n")
        sys.stdout.flush()
        plans += [make_plan(config, where, None, size) for size in sizes[1:]]
        sys.stdout.write(table(plans) + "\n")


_HELP = f"""usage: python -m tpu.plan [TASK] [--config FILE.yaml] [--topology NAME] [--sweep | --hlo FILE]
                          [flags of training]

{__doc__}
  --topology NAME   The slice to compile for (default v5e:2x2): {", ".join(topologies.KNOWN_TOPOLOGIES)}.
  --sweep           Try batch sizes, meshes and gradient checkpointing, and print those that fit, the fastest first.
  --hlo FILE        Write the compiled program to this file, as text.

Only the configs of pretrained models are read, so a folder without weights is enough. Data need not be named.
With --bucket_resolutions, a program is compiled for each size, and a table says what each costs.
"""

if __name__ == "__main__":
    command_line.main_guard(main)
