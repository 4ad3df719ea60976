"""Values and pictures in Weights & Biases."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import is_local, temporary_folder, write_text

ID_FILE = "wandb_run.json"
"""File in the folder of the boards with the run's id, by which a run that is resumed goes on in the same one."""


def log_in() -> None:
    """Log in as the environment, the user's files or, at a terminal, the user says; offline there is no need.

    Raises:
        ConfigError: If there is no API key, and nobody at a terminal to be asked.
    """
    import wandb  # pyright: ignore[reportMissingImports]  (optional)

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        wandb.login()
    except Exception as error:  # wandb's own errors have no common class of theirs
        raise _refused(error) from error


def _refused(error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConfigError(f"--report_to wandb: {reason}: log in by `wandb login`, set WANDB_MODE=offline, or drop it")


class WandbRun:
    """A run of Weights & Biases. It is offline where the environment variable WANDB_MODE says so.

    Args:
        folder: Folder of the boards.
        project: Name of the project.
        name: Name of the run.
        options: The options to show with it.

    Raises:
        ConfigError: If it cannot be started.
    """

    def __init__(self, folder: Path, *, project: str, name: str, options: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]  (optional)

        self._wandb: Any = wandb
        file = folder / ID_FILE
        identity = _read_id(file) if file.exists() else uuid.uuid4().hex
        local = folder if is_local(folder) else temporary_folder()
        local.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project, name=name, id=identity, resume="allow", dir=str(local), config=dict(options)
            )
        except Exception as error:  # as in `log_in`
            raise _refused(error) from error
        write_text(file, json.dumps({"id": identity}) + "\n")
        # Steps that were taken again after a resume are reported again, which wandb's own count of steps refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add values by name.

        Args:
            values: Value by name.
            step: The optimizer step.
        """
        self._run.log({**values, "step": step})

    def image(self, tag: str, picture: Image.Image, step: int) -> None:
        """Add a picture.

        Args:
            tag: Its name.
            picture: The picture.
            step: The optimizer step.
        """
        self._run.log({tag: self._wandb.Image(picture), "step": step})

    def flush(self) -> None:
        """Do nothing: wandb writes in a process of its own."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _read_id(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: holds no id of a run of wandb: delete it, and a new run begins there") from error
