"""Comparison of both backends: `python -m flax_diffusion.parity [TASK] --config FILE --steps N [--dtype float64]`.

The same weights, batches and rates go through the JAX and the PyTorch train step. Losses, gradient norms, weights and
moving averages are compared after every step.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flax_diffusion.core.backend import Backend, Batch
from flax_diffusion.core.checkpoints.portable import Arrays
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.run import launch
from flax_diffusion.core.run.schedule.steps import make_rate, make_schedule
from flax_diffusion.core.tasks.task import task_of

BOUNDS = {"float64": {"loss": 1e-10, "state": 1e-9}, "float32": {"loss": 1e-4, "state": 1e-4}}
"""Largest relative differences that count as equal, over a run of 50 steps."""


class ParityOptions(BaseModel):
    """Options of `parity`, besides all options of `train`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(10, ge=1, description="Optimizer steps to compare.")
    dtype: Literal["float32", "float64"] = Field(
        "float64", description="Precision of weights and computation. float32 leaves out the biases of attention keys."
    )
    report_dir: str = Field("parity", description="Folder for parity.json and parity.png.")


@dataclass(frozen=True)
class Row:
    """Results of one optimizer step on both backends.

    Attributes:
        step: Number of the step, from 1.
        loss_jax: Loss on JAX.
        loss_torch: Loss on PyTorch.
        grad_norm_jax: Gradient norm on JAX.
        grad_norm_torch: Gradient norm on PyTorch.
        params: Largest relative difference of the weights after the step.
        ema: Largest relative difference of the moving averages after the step.
        validation: Largest relative difference of the validation losses after the last step; None elsewhere, and where
            no picture is held out.
        parts: Largest relative difference of the parts of the loss; 0 where it has none.
    """

    step: int
    loss_jax: float
    loss_torch: float
    grad_norm_jax: float
    grad_norm_torch: float
    params: float
    ema: float
    validation: float | None = None
    parts: float = 0.0

    @property
    def loss(self) -> float:
        """Relative difference of the losses."""
        return relative(self.loss_jax, self.loss_torch)


def relative(ours: float, theirs: float) -> float:
    """Return the relative difference of two numbers."""
    return abs(ours - theirs) / max(abs(ours), 1e-300)


def largest(values: Iterable[float]) -> float:
    """Return the largest of some numbers, 0 for none, and NaN if one is, which Python's `max` may pass over."""
    return float(np.max([0.0, *values]))


NO_GRADIENT = re.compile(r"\.(to_k|k_proj)\.bias$")
"""Names of the biases of attention keys, whose gradient is zero except for rounding.

Such a bias adds the same to all scores of a query, which the softmax removes again, so nothing that the model computes
depends on it. Adam divides a gradient by its size, so in float32 rounding alone moves these weights, by up to the
learning rate per step. In float64 they stay within the bounds.
"""


def difference(ours: Arrays, theirs: Arrays, kind: str, leave_out: re.Pattern[str] | None = None) -> float:
    """Compute the largest difference of any weight, relative to the root mean square of its model's weights.

    Args:
        ours: Arrays of one backend, by portable name.
        theirs: Arrays of the other backend.
        kind: `params`, or the name of a moving average.
        leave_out: Pattern of names to leave out; None for none.
    """
    models: dict[str, list[str]] = {}
    for name in ours:
        if name.startswith(f"{kind}/") and not (leave_out and leave_out.search(name)):
            models.setdefault(name.split("/")[1], []).append(name)
    found = []
    for names in models.values():
        apart = largest(float(np.abs(ours[name].astype(np.float64) - theirs[name]).max()) for name in names)
        squares = sum(float(np.sum(np.square(ours[name], dtype=np.float64))) for name in names)
        found.append(apart / math.sqrt(squares / sum(ours[name].size for name in names)))
    return largest(found)


def compare(config: TrainConfig, steps: int, dtype: str = "float64") -> Iterator[Row]:
    """Run both backends step by step.

    Args:
        config: Options of a run; nothing is written to its output folder.
        steps: Optimizer steps to compare.
        dtype: Precision of weights and computation, "float32" or "float64".

    Yields:
        The results of each step.

    Raises:
        ConfigError: If a framework is missing, or if the run draws numbers on the device.
    """
    launch.require(("jax", "torch", "diffusers", "accelerate"), launch.INSTALL_PYTORCH)
    if dtype == "float64" and config.mixed_precision != "no":
        raise ConfigError(f"--dtype float64 with --mixed_precision {config.mixed_precision}: drop one of them")
    if config.use_8bit_adam:
        raise ConfigError("--use_8bit_adam rounds moments differently on the two backends: drop it")
    import jax
    import torch

    from flax_diffusion.core.run import assembly
    from flax_diffusion.core.run.precompute import precompute
    from flax_diffusion.core.run.schedule import rates
    from flax_diffusion.core.validation.held_out import divide, held_out, with_held_out
    from flax_diffusion.core.validation.loss import ValidationLoss
    from flax_diffusion.jax_backend.backend import JaxBackend
    from torch_backend.backend import TorchBackend

    with jax.enable_x64(dtype == "float64"):
        task = task_of(config)
        task.precomputed_dir = None  # what is kept there may be of another precision
        source = task.open_source()
        spec = task.make_spec(source)
        source, validation = divide(task, source)
        for name, component in spec.components.items():
            if component.is_trained and component.config.get("dropout"):
                raise ConfigError(
                    f"{name}: dropout {component.config['dropout']} draws different masks on the two backends: set it "
                    "to 0 in the model's config"
                )
            if component.lora is not None and component.lora.dropout:
                raise ConfigError(
                    f"--lora_dropout {component.lora.dropout} draws different masks on the two backends: set it to 0"
                )
        ours = JaxBackend(config, spec, jax.devices()[:1], np.dtype(dtype))
        theirs = TorchBackend(config, spec, getattr(torch, dtype))
        backends: tuple[Backend, Backend] = (ours, theirs)
        for backend in backends:
            backend.init_state()
        schedule = make_schedule(config, task.count_examples(source), 1)
        buckets = assembly.make_buckets(task, spec, source, schedule)
        examples = held_out(validation, buckets, skip_bad_images=config.skip_bad_images)
        source = task.complete_source(source, ours)
        rate = make_rate(config, schedule)
        with tempfile.TemporaryDirectory() as folder:
            pictures, sizes = with_held_out(source, buckets, task.rows_per_example, examples)
            made = precompute(task, spec, pictures, ours, Path(folder), sizes)
            judges = []
            if examples is not None:
                judges = [
                    ValidationLoss(task, spec, examples, made, backend, schedule.batch_size, dtype)
                    for backend in backends
                ]
            options: dict[str, Any] = {"num_steps": steps, "made": made, "dtype": dtype, "buckets": buckets}
            with assembly.make_loader(task, spec, source, schedule, **options) as loader:
                for done, batch in enumerate(loader):
                    leave_out = NO_GRADIENT if dtype == "float32" else None
                    row = _row(backends, batch, done, rate(done), rates.ema_decays(config, done), leave_out)
                    if judges and done + 1 == steps:
                        a, b = (judge() for judge in judges)
                        apart = largest(relative(a[name], b[name]) for name in a)
                        row = replace(row, validation=apart)
                    yield row


def _row(
    backends: tuple[Backend, Backend],
    batch: Batch,
    done: int,
    rate: float,
    decays: Mapping[str, float],
    leave_out: re.Pattern[str] | None,
) -> Row:
    ours, theirs = (backend.read(backend.train_step(backend.put(batch), rate, decays)) for backend in backends)
    a, b = (backend.state_arrays() for backend in backends)
    return Row(
        done + 1,
        ours["loss"],
        theirs["loss"],
        ours["grad_norm"],
        theirs["grad_norm"],
        difference(a, b, "params", leave_out),
        largest(difference(a, b, average, leave_out) for average in decays),
        parts=largest(relative(ours[name], theirs[name]) for name in ours if name.endswith("_loss")),
    )


def verdict(rows: Sequence[Row], dtype: str) -> tuple[bool, str]:
    """Judge whether both backends are equal.

    Args:
        rows: The results of the steps.
        dtype: Precision of the run, "float32" or "float64".

    Returns:
        Whether all rows are within the bounds of `dtype`, and a line that says so.
    """
    bounds = BOUNDS[dtype]
    loss = largest(apart for row in rows for apart in (row.loss, row.parts))
    validation = rows[-1].validation
    state = largest(apart for row in rows for apart in (row.params, row.ema))
    equal = loss <= bounds["loss"] and state <= bounds["state"] and (validation is None or validation <= bounds["loss"])
    of_validation = "" if validation is None else f", validation losses within {validation:.1e}"
    return equal, (
        f"{'EQUAL' if equal else 'DIFFERENT'} in {dtype} over {len(rows)} steps: losses within {loss:.1e}"
        f"{of_validation} (bound {bounds['loss']:.0e}), weights and averages within {state:.1e} "
        f"(bound {bounds['state']:.0e})"
    )


def _plot(rows: Sequence[Row], path: Path) -> None:
    """Plot both loss curves, and below them the differences on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row.step for row in rows]
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    top.plot(steps, [row.loss_jax for row in rows], label="JAX")
    top.plot(steps, [row.loss_torch for row in rows], "--", label="PyTorch")
    top.set_ylabel("loss")
    for name in ("loss", "params", "ema"):
        bottom.semilogy(steps, [getattr(row, name) or np.nan for row in rows], label=name)
    bottom.set_ylabel("relative difference")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: The words of the command line; None for those of this process.

    Raises:
        SystemExit: With status 1 if the backends differ.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = command_line.Parser(prog="python -m flax_diffusion.parity", description=__doc__, add_help=False)
    command_line.add_fields(parser, ParityOptions)
    given, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(parser.format_help() + "\nAll options of `train` go with these; they are:\n\n")
    _, config = command_line.parse_train(rest, "python -m flax_diffusion.parity")
    options: ParityOptions = command_line.build(ParityOptions, vars(given), "command line")

    rows: list[Row] = []
    header = f"{'step':>5} {'loss JAX':>14} {'loss PyTorch':>14} {'norm JAX':>12} {'norm PyTorch':>12}"
    sys.stdout.write(f"{header} {'loss diff':>9} {'weights':>9} {'average':>9}\n")
    for row in compare(config, options.steps, options.dtype):
        rows.append(row)
        sys.stdout.write(
            f"{row.step:>5} {row.loss_jax:>14.10f} {row.loss_torch:>14.10f} {row.grad_norm_jax:>12.6f} "
            f"{row.grad_norm_torch:>12.6f} {row.loss:>9.1e} {row.params:>9.1e} {row.ema:>9.1e}\n"
        )
        sys.stdout.flush()
    equal, line = verdict(rows, options.dtype)
    folder = Path(options.report_dir)
    write_json(
        folder / "parity.json",
        {"dtype": options.dtype, "equal": equal, "bounds": BOUNDS[options.dtype], "steps": [asdict(r) for r in rows]},
    )
    _plot(rows, folder / "parity.png")
    sys.stdout.write(f"{line}\n")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    command_line.main_guard(main)
