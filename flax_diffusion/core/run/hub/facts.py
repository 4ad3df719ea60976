"""What the model card of a run says of it."""

from __future__ import annotations

import shlex
from pathlib import Path

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.config.spellings import option_words
from flax_diffusion.core.io.files import names_in
from flax_diffusion.core.io.metrics_file import METRICS_FILE, read_metrics
from flax_diffusion.core.run import lineage
from flax_diffusion.core.spec.cards import Facts
from flax_diffusion.core.tasks.task import Task

_NOT_SHOWN = ("push_to_hub", "hub_model_id", "hub_private_repo")


def facts_of(task: Task[TrainConfig], command: str, step: int, folder: Path, repository: str) -> Facts:
    """Return what the card of a run says.

    Args:
        task: The task, with the run's options.
        command: The command that trains on this backend.
        step: The optimizer step.
        folder: Folder of the run.
        repository: Where it is pushed to.
    """
    config = task.config
    grids = [name for name in names_in(folder / "samples") if name.endswith(".png")]
    rows = [row for row in read_metrics(folder / METRICS_FILE) if row["step"] <= step]
    measured = {name: value for row in rows for name, value in row.items() if name != "step" and value is not None}
    return Facts(
        title=repository.rpartition("/")[2],
        made=f"trained by the task `{task.name}`",
        tags=("diffusers-training", task.name.replace("_", "-")),
        base=config.pretrained_model_name_or_path,
        dataset=getattr(config, "dataset_name", None),
        command=command_of(command, task),
        prompts=task.prompts,
        grid=f"samples/{grids[-1]}" if grids else None,
        metrics=measured,
        step=step,
    )


def command_of(command: str, task: Task[TrainConfig]) -> str:
    """Return the command that trains as a run did, with the options that are not the defaults, and no secret.

    Args:
        command: The command that trains on this backend.
        task: The task, with the run's options.
    """
    values = lineage.recipe_values(task.config)
    own = {name: value for name, value in values.items() if name not in _NOT_SHOWN}
    return shlex.join([*command.split(), task.name, *option_words(type(task.config), own)])
