"""Latents and text embeddings by JAX, without training: `python -m flax_diffusion.precompute TASK [flags of train]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.display import first_line

if __name__ == "__main__":
    first_line.say("precomputing", "JAX")  # before the imports that follow, which take a second

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.run import launch
from flax_diffusion.train import load_backend


def precompute(task: str, config: str | Path | None = None, **options: Any) -> Path:
    """Compute what `train` with the same options computes before its first step, and train nothing.

    Args:
        task: As of `train`.
        config: Path of a YAML recipe; None for none.
        options: Values of the command line's flags, by name, among them `precomputed_dir`; they override the recipe.

    Returns:
        The folder `precomputed_dir`, which later runs of any task and of either backend read.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    return launch.precompute(load_backend, task, config, options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    launch.main(load_backend, "python -m flax_diffusion.precompute", argv, only_precompute=True)


if __name__ == "__main__":
    command_line.main_guard(main)
