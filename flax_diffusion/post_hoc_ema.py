"""Averages chosen after training: `python -m flax_diffusion.post_hoc_ema RUN --sigma_rel S --output_dir DIR`.

It sums the snapshots that a run with --ema_sigma_rels and --ema_snapshot_steps has kept. It needs NumPy alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flax_diffusion.core.checkpoints import snapshots
from flax_diffusion.core.checkpoints.power_ema import combination
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import MAX_SIGMA_REL, also
from flax_diffusion.core.errors import CheckpointError, ConfigError
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.spec import writing

log = logging.getLogger(__name__)

FAR = 0.05
"""Distance of profiles from which on a warning says that the average is another than the one asked for."""


class PostHocFlags(BaseModel):
    """Options of `post_hoc_ema`, besides the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sigma_rel: float = Field(gt=0, lt=MAX_SIGMA_REL, description="Relative width of the average to make.")
    output_dir: str = Field(
        validation_alias=also("output_dir", "output"), description="Folder to write to, which must be empty or new."
    )
    step: int | None = Field(None, ge=1, description="Optimizer step of the average. None: that of the last snapshot.")


class PostHocOptions(PostHocFlags):
    """Options of `post_hoc_ema`."""

    run: str = Field(description="Folder of a run that kept snapshots by --ema_snapshot_steps.")


def post_hoc_ema(run: str | Path, sigma_rel: float, output_dir: str | Path, step: int | None = None) -> Path:
    """Write an average that a run did not keep, made of the snapshots that it kept.

    Args:
        run: Folder of the run.
        sigma_rel: Relative width of the average.
        output_dir: Folder to write to: a pipeline, if the run has written its own.
        step: Optimizer step of the average; None for that of the last snapshot.

    Returns:
        The output folder.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    values: dict[str, Any] = {"run": str(run), "sigma_rel": sigma_rel, "output_dir": str(output_dir), "step": step}
    return _make(command_line.build(PostHocOptions, values, "post_hoc_ema"))


def _make(options: PostHocOptions) -> Path:
    run, out = as_path(options.run), as_path(options.output_dir)
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such folder: name the folder of a run")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--output_dir {out}: is there already; name an empty or a new folder")
    found = snapshots.find(run)
    if not found:
        raise CheckpointError(
            f"{run}: has no {snapshots.FOLDER}: train with --ema_sigma_rels 0.05 0.1 and --ema_snapshot_steps"
        )
    step = found[-1].step if options.step is None else options.step
    kept = [one for one in found if one.step <= step]
    if step > found[-1].step or not kept:
        raise ConfigError(
            f"--step {step}: the snapshots of {run} are of steps {found[0].step} to {found[-1].step}: give one of these"
        )
    factors, distance = combination([(one.sigma_rel, one.step) for one in kept], options.sigma_rel, step)
    say = log.info if distance < FAR else log.warning
    say(
        "sigma_rel %g at step %d: %d snapshots match its profile up to %.2g of its norm%s",
        options.sigma_rel, step, len(kept), distance,
        "" if distance < FAR else ", so that this is another average: give a width and step that are closer to theirs",
    )  # fmt: skip
    snapshots.combine(kept, factors, out)
    writing.complete(out, run)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("flax_diffusion").setLevel(logging.INFO)
    parser = command_line.Parser(prog="python -m flax_diffusion.post_hoc_ema", description=__doc__)
    parser.add_argument("run", metavar="RUN", help=PostHocOptions.model_fields["run"].description)
    command_line.add_fields(parser, PostHocFlags)
    options = command_line.build(PostHocOptions, parser.parse(sys.argv[1:] if argv is None else argv), "command line")
    sys.stderr.write(f"written to {_make(options)}\n")


if __name__ == "__main__":
    command_line.main_guard(main)
