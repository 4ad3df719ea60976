"""Training with PyTorch: `python -m torch_backend.train TASK [--config FILE.yaml] [flags]`.

With `accelerate launch -m torch_backend.train …` it runs in several processes, with FSDP or with DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.display import console, first_line

if __name__ == "__main__":
    first_line.say("training", "PyTorch")  # before the imports that follow, which take a second

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.sources.given import Examples
from flax_diffusion.core.run import launch
from flax_diffusion.core.run.result import TrainResult
from flax_diffusion.core.tracking.callbacks import Callback
from torch_backend.generate import generate

__all__ = ["Callback", "TrainResult", "main", "train"]


def train(
    task: str,
    config: str | Path | None = None,
    *,
    examples: Examples | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> TrainResult:
    """Train a model, with the arguments, result and errors of `flax_diffusion.train.train`."""
    given: dict[str, Any] = {"generate": generate, "examples": examples, "callbacks": callbacks}
    return launch.train(load_backend, task, config, options, **given)


def load_backend() -> Any:
    """Import PyTorch and return the backend's class."""
    launch.require(launch.PYTORCH_PACKAGES, launch.INSTALL_PYTORCH)
    from torch_backend.backend import TorchBackend

    _leave_the_console()
    return TorchBackend


def _leave_the_console() -> None:
    """Leave the console to the run: libraries show no bars there, and log only what went wrong."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.disable_default_handler()  # which writes to stderr itself
        library.enable_propagation()
    if console.current().level > logging.DEBUG:
        for name in ("diffusers", "transformers", "accelerate"):
            logging.getLogger(name).setLevel(logging.ERROR)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    launch.main(load_backend, "python -m torch_backend.train", argv)


if __name__ == "__main__":
    command_line.main_guard(main)
