"""What a page says of a run beside its values: what trains where, the command that reproduces it, the environment."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
from typing import Any

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import CONFIG_FILE, TrainConfig
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.report.options import without_home
from flax_diffusion.core.run.hub.facts import command_of
from flax_diffusion.core.run.start import Start
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

_PACKAGES = {
    "jax": ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu"),
    "torch": ("torch", "diffusers", "accelerate", "peft", "bitsandbytes", "deepspeed"),
    "numpy": ("flax-diffusion", "numpy", "pillow", "transformers", "tokenizers", "grain"),
}
"""Packages whose versions are told, by the module that is loaded where they are used."""


def facts_of(task: Task[TrainConfig], spec: PipelineSpec, backend: Backend, start: Start) -> dict[str, Any]:
    """Return what is known of a run once its weights are loaded, as plain data.

    There is no name of a user or a machine in it, and the home folder is `~`.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        backend: The backend of this process.
        start: The inputs of the run's first step.
    """
    described, folder = backend.describe(), as_path(task.config.output_dir)
    processes = f" of {backend.process_count} processes" if backend.process_count > 1 else ""
    return {
        "task": task.name,
        "model": spec.kind,
        "parameters": start.parameters,
        "frozen": described.frozen_parameters,
        "devices": f"{backend.device_count} x {described.device}{processes}",
        "batch": start.schedule.step_examples,
        "total": start.schedule.total_steps,
        "command": without_home(shlex.split(command_of(backend.command, task))),
        "again": without_home([*backend.command.split(), "--config", str(folder / CONFIG_FILE)]),
        "environment": _environment(),
    }


def _environment() -> dict[str, str]:
    """Return the versions of what computes."""
    versions = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in (name for module, names in _PACKAGES.items() if module in sys.modules for name in names):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an optional one
            continue
    return versions
