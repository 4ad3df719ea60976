"""Sampling of images with PyTorch: `python -m torch_backend.generate --model DIR [--prompt …] [flags]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.drawing import command
from flax_diffusion.core.drawing.options import GenerateConfig, calls_of, check_one_size, options_of
from flax_diffusion.core.run import launch
from flax_diffusion.core.spec.prompts import sampler_config


def generate(model: str | Path, **options: Any) -> np.ndarray:
    """Draw images, with the arguments, result and errors of `flax_diffusion.generate.generate`."""
    config = options_of(model, options)
    return np.concatenate([*_draw(config, check_one_size(config, calls_of(config)))])


def _draw(config: GenerateConfig, calls: Sequence[GenerateConfig]) -> Iterator[np.ndarray]:
    launch.require(launch.PYTORCH_PACKAGES, launch.INSTALL_PYTORCH)
    import torch
    from accelerate import PartialState

    from torch_backend.modules import COMPUTE_DTYPES, build_modules, shapes
    from torch_backend.sampling import Sampler, scheduler_from_config

    spec = command.open_checked(config, calls, shapes)
    chosen = command.scheduler_of(config, spec)
    scheduler = scheduler_from_config(sampler_config(spec, chosen), chosen)
    device = PartialState().device or torch.device("cpu")
    modules = build_modules(
        spec, seed=config.seed, frozen_dtype=COMPUTE_DTYPES[config.mixed_precision], trained_dtype=torch.float32,
        device=device,
    )  # fmt: skip
    sampler = Sampler(modules, scheduler, device)
    return chain.from_iterable([sampler.batches(**command.sampler_options(call, spec)) for call in calls])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    command.main(_draw, "python -m torch_backend.generate", argv)


if __name__ == "__main__":
    command_line.main_guard(main)
