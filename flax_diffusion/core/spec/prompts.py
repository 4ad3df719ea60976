"""What the denoiser is told of the pictures to draw, beside sample and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flax_diffusion.core.data.batches import size_numbers
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.spec.pipeline import PipelineSpec


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the denoiser is told of each prompt's pictures, by array of a batch.

    Attributes:
        prompts: Arrays (prompts, …); empty where it is told nothing.
        away: Arrays (…) of what to guide away from, where that is something else than of the prompt.
        zeroed: Arrays that the text encoders make of a prompt, which are zero in what to guide away from.
    """

    prompts: Mapping[str, np.ndarray]
    away: Mapping[str, np.ndarray]
    zeroed: tuple[str, ...]


def told(
    spec: PipelineSpec, prompts: Sequence[str], negative_prompt: str, extra: Mapping[str, np.ndarray] | None = None
) -> Told:
    """Return what the denoiser is told of the pictures to draw.

    Args:
        spec: The pipeline.
        prompts: Texts; empty for an unconditional pipeline.
        negative_prompt: Text to guide away from.
        extra: What it is told beside the prompts, by array of a batch, (prompts, …); None for nothing.

    Raises:
        ConfigError: If prompts are missing, or given to a pipeline that takes none.

    Reference:
        StableDiffusionXLPipeline of Diffusers, for the size numbers and for `force_zeros_for_empty_prompt`.
    """
    check_prompts(spec, prompts)
    tokenize, family, arrays = spec.tokenize, spec.family, dict(extra or {})
    if tokenize is None:
        return Told(prompts=arrays, away={}, zeroed=())
    arrays |= tokenize.stacked(prompts)
    if family.told_sizes:
        size = spec.size or (spec.resolution, spec.resolution)
        arrays |= {name: np.stack([row] * len(prompts)) for name, row in size_numbers(size, (0, 0), size).items()}
    zeroed = not negative_prompt and bool(spec.setting("force_zeros_for_empty_prompt"))
    return Told(prompts=arrays, away=tokenize(negative_prompt), zeroed=family.prompt_arrays if zeroed else ())


def check_prompts(spec: PipelineSpec, prompts: Sequence[str]) -> None:
    """Make sure that there are prompts exactly where the pipeline takes them.

    Args:
        spec: The pipeline.
        prompts: The prompts.

    Raises:
        ConfigError: If prompts are missing, or given to a pipeline that takes none.
    """
    if bool(spec.tokenizers) != bool(prompts):
        fix = "drop --prompt" if prompts else "give at least one --prompt"
        raise ConfigError(f"a {spec.kind} with {len(prompts)} prompts: {fix}")
