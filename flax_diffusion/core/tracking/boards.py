"""The boards that a run reports to: TensorBoard, Weights & Biases, a CSV file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.report.files import DATA
from flax_diffusion.core.tasks.task import Task
from flax_diffusion.core.tracking.csv_file import FILE, CsvFile
from flax_diffusion.core.tracking.tensorboard import EVENT_FILES, TensorBoard
from flax_diffusion.core.tracking.wandb_run import ID_FILE, WandbRun, log_in

BOARDS = ("tensorboard", "wandb", "csv")
"""Names of all boards, for --report_to."""
FILES = (EVENT_FILES, FILE, ID_FILE, DATA)
"""Globs of the files that boards leave, and the page of a run beside them."""
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Board(Protocol):
    """Something that keeps a run's values and pictures."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values by name, such as `train/loss`, of a step."""
        ...

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add a picture by its name."""
        ...

    def flush(self) -> None:
        """Write everything added so far to disk."""
        ...

    def close(self) -> None:
        """Write what is left, and end."""
        ...


def named(report_to: Sequence[str]) -> list[str]:
    """Return the boards that --report_to names: of `all`, those whose package is installed.

    Args:
        report_to: The option.

    Raises:
        ConfigError: If the package of one is not installed.
    """
    if list(report_to) == ["none"]:
        return []
    installed = [name for name in BOARDS if name not in _PACKAGES or find_spec(_PACKAGES[name]) is not None]
    if "all" in report_to:
        return installed
    for name in report_to:
        if name not in installed:
            raise ConfigError(f"--report_to {name}: {name} is not installed: pip install {_PACKAGES[name]}")
    return list(dict.fromkeys(report_to))


def prepare(report_to: Sequence[str], *, main: bool) -> None:
    """Make sure that boards can be opened, before any long work.

    Args:
        report_to: The option.
        main: Whether this is the first process, the one that opens them.

    Raises:
        ConfigError: If the package of one is not installed, or if Weights & Biases has no log-in.
    """
    if "wandb" in named(report_to) and main:
        log_in()


def open_boards(task: Task[TrainConfig], folder: Path, first_step: int, options: Mapping[str, Any]) -> list[Board]:
    """Open the boards of a run.

    Args:
        task: The task, with the run's options.
        folder: Folder for their files.
        first_step: First step that is reported; what an earlier start of the run reported from it on is left out.
        options: The options to show with the run, without secrets.

    Raises:
        ConfigError: If one is not installed, or cannot be opened.
    """
    config = task.config
    run = as_path(config.output_dir).name
    made: dict[str, Callable[[], Board]] = {
        "tensorboard": lambda: TensorBoard(folder, first_step),
        "wandb": lambda: WandbRun(folder, project=config.tracker_project_name, name=run, options=options),
        "csv": lambda: CsvFile(folder, first_step),
    }
    return [made[name]() for name in named(config.report_to)]
