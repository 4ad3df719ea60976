"""Sampling of images from a pipeline folder: `python -m flax_diffusion.generate --model DIR [--prompt …] [flags]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.drawing import command
from flax_diffusion.core.drawing.options import GenerateConfig, calls_of, check_one_size, options_of


def generate(model: str | Path, **options: Any) -> np.ndarray:
    """Draw images from a model.

    Args:
        model: Folder or Hub id of a Diffusers pipeline, or a run or a checkpoint in one.
        options: Values of the command line's flags, by name, except `output_dir` and `overwrite_output_dir`.

    Returns:
        Images, uint8 (N, H, W, C), prompt by prompt; of a file of prompts, which must all have one size.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    config = options_of(model, options)
    return np.concatenate([*_draw(config, check_one_size(config, calls_of(config)))])


def _draw(config: GenerateConfig, calls: Sequence[GenerateConfig]) -> Iterator[np.ndarray]:
    # JAX is imported only now, so that --help and mistakes in options are answered at once.
    from flax_diffusion.jax_backend import drawing
    from flax_diffusion.jax_backend.sharding import make_mesh

    pipeline = drawing.open_pipeline(config, drawing.open_spec(config, calls), make_mesh(-1, 1))
    return chain.from_iterable([drawing.pictures(pipeline, call) for call in calls])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    command.main(_draw, "python -m flax_diffusion.generate", argv)


if __name__ == "__main__":
    command_line.main_guard(main)
