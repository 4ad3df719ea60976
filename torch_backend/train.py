"""Training with PyTorch: `python -m torch_backend.train TASK [--config FILE.yaml] [flags]`.

The same under `accelerate launch -m torch_backend.train …`, which brings several processes, FSDP and DeepSpeed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core import cli
from flax_diffusion.core.config import TrainConfig


def train(task: str, config: str | Path | None = None, **options: Any) -> Path:
    """Trains a model, as the command line does; arguments, result and errors as `flax_diffusion.train.train`."""
    return _run(task, cli.merge(task, cli.read_yaml(config) if config else {}, options, str(config)))


def _run(task: str, config: TrainConfig) -> Path:
    # Frameworks load only now: --help and mistakes in options are answered at once.
    from flax_diffusion.core.loop import fit
    from torch_backend.backend import TorchBackend

    return fit(task, config, TorchBackend)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("flax_diffusion").setLevel(logging.INFO)
    task, config = cli.parse_train(sys.argv[1:] if argv is None else argv, "python -m torch_backend.train")
    _run(task, config)


if __name__ == "__main__":
    cli.main_guard(main)
