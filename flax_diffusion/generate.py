"""Sampling of images from a pipeline folder: `python -m flax_diffusion.generate --model DIR [--prompt …] [flags]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.drawing import command
from flax_diffusion.core.objectives import samplers


def generate(model: str | Path, **options: Any) -> np.ndarray:
    """Draw images from a model.

    Args:
        model: Folder or Hub id of a Diffusers pipeline, or a run or a checkpoint in one.
        options: Values of the command line's flags, by name, except `output_dir` and `overwrite_output_dir`.

    Returns:
        Images, uint8 (N, H, W, C), prompt by prompt.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    return np.concatenate([*_draw(command.options_of(model, options))])


def _draw(config: command.GenerateConfig) -> Iterator[np.ndarray]:
    # JAX is imported only now, so that --help and mistakes in options are answered at once.
    from flax_diffusion.jax_backend.modules import COMPUTE_DTYPES, build_modules, load_pretrained, shapes
    from flax_diffusion.jax_backend.sampling import Sampler
    from flax_diffusion.jax_backend.sharding import make_mesh, put_replicated
    from flax_diffusion.schedulers import scheduler_from_config

    spec = command.open_checked(config, shapes)
    mesh = make_mesh(-1, 1)
    modules = build_modules(spec, COMPUTE_DTYPES[config.mixed_precision], mesh=mesh)
    scheduler = scheduler_from_config(samplers.sampler_config(spec.scheduler, config.scheduler), kind=config.scheduler)
    sampler = Sampler(modules, scheduler, mesh)
    params = {name: put_replicated(load_pretrained(part), mesh) for name, part in spec.components.items()}
    return sampler.batches(params, **command.sampler_options(config, spec))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    command.main(_draw, "python -m flax_diffusion.generate", argv)


if __name__ == "__main__":
    command_line.main_guard(main)
