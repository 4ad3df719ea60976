"""Training with JAX: `python -m flax_diffusion.train TASK [--config FILE.yaml] [flags]`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core import cli
from flax_diffusion.core.config import TrainConfig


def train(task: str, config: str | Path | None = None, **options: Any) -> Path:
    """Trains a model, as the command line does.

    Args:
        task: `unconditional` or `text_to_image`.
        config: A YAML recipe.
        options: Anything that is a flag on the command line, by the same name; they override the recipe.

    Returns:
        The output folder: a Diffusers pipeline, with the run's checkpoints, samples and logs.

    Raises:
        UserError: For input that cannot be used; its text is one line with the fix.
    """
    return _run(task, cli.merge(task, cli.read_yaml(config) if config else {}, options, str(config)))


def _run(task: str, config: TrainConfig) -> Path:
    # Frameworks load only now: --help and mistakes in options are answered at once.
    from flax_diffusion.backend import JaxBackend
    from flax_diffusion.core.loop import fit

    return fit(task, config, JaxBackend)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("flax_diffusion").setLevel(logging.INFO)
    task, config = cli.parse_train(sys.argv[1:] if argv is None else argv, "python -m flax_diffusion.train")
    _run(task, config)


if __name__ == "__main__":
    cli.main_guard(main)
