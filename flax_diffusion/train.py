"""Training with JAX: `python -m flax_diffusion.train TASK [--config FILE.yaml] [flags]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.display import first_line

if __name__ == "__main__":
    first_line.say("training", "JAX")  # before the imports that follow, which take a second

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.io.files import user_cache
from flax_diffusion.core.run import launch


def train(task: str, config: str | Path | None = None, **options: Any) -> Path:
    """Train a model, as the command line does.

    Args:
        task: Name of the task, one of `core.tasks.task.TASKS`.
        config: Path of a YAML recipe, or the name of an installed one; None for none.
        options: Values of the command line's flags, by name; they override the recipe.

    Returns:
        The output folder: a Diffusers pipeline, an autoencoder or adapters, with the run's checkpoints, samples and
        logs.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    return launch.train(load_backend, task, config, options)


def load_backend() -> Any:
    """Import JAX, join the other hosts, and return the backend's class."""
    from flax_diffusion.jax_backend.backend import JaxBackend
    from flax_diffusion.jax_backend.processes import connect

    connect()
    _keep_programs()
    return JaxBackend


def _keep_programs() -> None:
    """Keep the compiled programs of accelerators for the next start, because compiling takes minutes.

    They are kept in the folder that the environment variable JAX_COMPILATION_CACHE_DIR names, else in the user's cache.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "programs"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    launch.main(load_backend, "python -m flax_diffusion.train", argv)


if __name__ == "__main__":
    command_line.main_guard(main)
