"""Training with PyTorch: `python -m torch_backend.train TASK [--config FILE.yaml] [flags]`.

The same under `accelerate launch -m torch_backend.train …`, which brings several processes, FSDP and DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.run import launch

PACKAGES = ("torch", "diffusers", "accelerate")


def train(task: str, config: str | Path | None = None, **options: Any) -> Path:
    """Trains a model, as the command line does; arguments, result and errors as `flax_diffusion.train.train`."""
    return launch.train(_backend, task, config, options)


def _backend() -> Any:
    launch.require(PACKAGES, launch.INSTALL_PYTORCH)
    from torch_backend.backend import TorchBackend

    return TorchBackend


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    launch.main(_backend, "python -m torch_backend.train", argv)


if __name__ == "__main__":
    command_line.main_guard(main)
