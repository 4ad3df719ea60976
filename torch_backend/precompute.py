"""Latents and text embeddings by PyTorch, without training: `python -m torch_backend.precompute TASK [flags of train]`.

With `accelerate launch -m torch_backend.precompute …` it runs in several processes, which divide the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.display import first_line

if __name__ == "__main__":
    first_line.say("precomputing", "PyTorch")  # before the imports that follow, which take a second

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.run import launch
from torch_backend.train import load_backend


def precompute(task: str, config: str | Path | None = None, **options: Any) -> Path:
    """Fill a folder of latents and text embeddings, as `flax_diffusion.precompute.precompute` does."""
    return launch.precompute(load_backend, task, config, options)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    launch.main(load_backend, "python -m torch_backend.precompute", argv, only_precompute=True)


if __name__ == "__main__":
    command_line.main_guard(main)
