"""Training with JAX: `python -m flax_diffusion.train TASK [--config FILE.yaml] [flags]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.display import first_line

if __name__ == "__main__":
    first_line.say("training", "JAX")  # before the imports that follow, which take a second

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.sources.given import Examples
from flax_diffusion.core.io.files import user_cache
from flax_diffusion.core.run import launch
from flax_diffusion.core.run.result import TrainResult
from flax_diffusion.core.tracking.callbacks import Callback
from flax_diffusion.generate import generate

__all__ = ["Callback", "TrainResult", "main", "train"]


def train(
    task: str,
    config: str | Path | None = None,
    *,
    examples: Examples | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> TrainResult:
    """Train a model, as the command line does.

    Args:
        task: Name of the task, one of `core.tasks.task.TASKS`.
        config: Path of a YAML recipe, or the name of an installed one; None for none.
        examples: Examples to train on in place of the data that options name, each a mapping such as
            `{"image": picture, "text": "a dog"}`: a sequence, which is read lazily and by several threads; a generator,
            which is read to its end first and whose pictures are held in memory as uint8; or a `datasets.Dataset`. A
            picture is a Pillow image, an array (H, W) or (H, W, C) of uint8 or of floats in [0, 1], the path of a file,
            or the bytes of one. Options such as `image_column`, `caption_column` and `label_column` name other keys.
            A run resumes with the same examples alone.
        callbacks: Objects of subclasses of `Callback`, which are told of steps, samples and checkpoints.
        options: Values of the command line's flags, by name; they override the recipe.

    Returns:
        The result, which stands for the path of the output folder: a Diffusers pipeline, an autoencoder or adapters,
        with the run's checkpoints, samples and logs. Its `sample()` draws from the model.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix. A callback that raises is a
            `CallbackError`, once the run has saved.
        KeyboardInterrupt: After Ctrl-C, once everything is saved.
    """
    given: dict[str, Any] = {"generate": generate, "examples": examples, "callbacks": callbacks}
    return launch.train(load_backend, task, config, options, **given)


def load_backend() -> Any:
    """Import JAX, join the other hosts, and return the backend's class."""
    from flax_diffusion.jax_backend.backend import JaxBackend
    from flax_diffusion.jax_backend.cores import offered
    from flax_diffusion.jax_backend.processes import connect

    offered()  # before JAX is used
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
