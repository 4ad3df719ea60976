"""The folder that a run leaves everything in: whether it is free, and what an earlier run left there."""

from __future__ import annotations

from pathlib import Path

from flax_diffusion.core import checkpoints
from flax_diffusion.core.adapters import EMBEDDINGS_FILE, LORA_FILE
from flax_diffusion.core.backend import Backend, shared_folder
from flax_diffusion.core.config import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.files import remove_tree

_WRITTEN = ("config.yaml", "model_index.json", LORA_FILE, EMBEDDINGS_FILE)
_WRITTEN_FOLDERS = ("samples", "logs", "unet", "vae", "vqvae", "text_encoder", "tokenizer", "scheduler")


def check(output_dir: Path, config: TrainConfig) -> Path | None:
    """Finds the checkpoint to resume from, or makes sure that no other run is in the way.

    Raises:
        ConfigError: If another run is in the folder, or it cannot be written.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir {output_dir}: is a file; name a folder")
    resume_from = checkpoints.to_resume(output_dir, config.resume_from_checkpoint)
    if has_run(output_dir) and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise ConfigError(
            f"--output_dir {output_dir}: holds another run; go on with it by --resume_from_checkpoint latest, "
            "delete it by --overwrite_output_dir, or name another folder"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir}: cannot be made: {error.strerror}") from error
    return resume_from


def has_run(output_dir: Path) -> bool:
    """Whether a folder holds what a run leaves."""
    return bool(checkpoints.committed(output_dir)) or any((output_dir / name).exists() for name in _WRITTEN)


def clear(output_dir: Path, config: TrainConfig, backend: Backend) -> None:
    """Deletes an earlier run where that is asked for, and what a killed one left, once every process has looked.

    Raises:
        ConfigError: If a process does not see what the first one writes.
    """
    shared_folder(output_dir, backend, "--output_dir")
    if backend.process_index == 0:
        if config.overwrite_output_dir and config.resume_from_checkpoint is None and has_run(output_dir):
            for path in checkpoints.committed(output_dir):
                remove_tree(path)
            for name in (*_WRITTEN_FOLDERS, config.logging_dir):
                remove_tree(output_dir / name)
            for name in _WRITTEN:
                (output_dir / name).unlink(missing_ok=True)
        checkpoints.clear_leftovers(output_dir)
    backend.everywhere(True)
