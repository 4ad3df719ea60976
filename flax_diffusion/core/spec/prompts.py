"""How pictures are drawn from a pipeline: what the denoiser is told beside sample and time, and by which sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flax_diffusion.core.data.batches import CLASS_LABELS, size_numbers
from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.families.dit import learns_variance
from flax_diffusion.core.objectives import samplers
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
        prompts: Texts, or classes by name or number; empty for an unconditional pipeline.
        negative_prompt: Text to guide away from.
        extra: What it is told beside the prompts, by array of a batch, (prompts, …); None for nothing.

    Raises:
        ConfigError: If prompts are missing, or given to a pipeline that takes none.

    Reference:
        StableDiffusionXLPipeline of Diffusers, for the size numbers and for `force_zeros_for_empty_prompt`.
    """
    check_prompts(spec, prompts)
    tokenize, family, arrays = spec.tokenize, spec.family, dict(extra or {})
    if spec.classes:
        arrays[CLASS_LABELS] = np.array([class_number(spec, label) for label in prompts], np.int32)
        away = {} if spec.null_class is None else {CLASS_LABELS: np.asarray(spec.null_class, np.int32)}
        return Told(prompts=arrays, away=away, zeroed=())
    if tokenize is None:
        return Told(prompts=arrays, away={}, zeroed=())
    arrays |= tokenize.stacked(prompts)
    if family.told_sizes:
        size = spec.size or (spec.resolution, spec.resolution)
        arrays |= {name: np.stack([row] * len(prompts)) for name, row in size_numbers(size, (0, 0), size).items()}
    zeroed = not negative_prompt and bool(spec.setting("force_zeros_for_empty_prompt"))
    return Told(prompts=arrays, away=tokenize(negative_prompt), zeroed=family.prompt_arrays if zeroed else ())


def class_number(spec: PipelineSpec, label: str) -> int:
    """Return the number of a class.

    Args:
        spec: The pipeline, whose denoiser is told classes.
        label: Its name, one of its names where that is a list with commas, or its number.

    Raises:
        ConfigError: If there is none, or if several have that name.
    """
    found = [place for place, name in enumerate(spec.classes) if name == label]
    found = found or [place for place, name in enumerate(spec.classes) if label in name.split(", ")]
    if not found and label.isdecimal() and int(label) < len(spec.classes):
        return int(label)
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"class {label}: {len(found)} have that name: give its number, such as {found[0]}")
    names = [name for several in spec.classes for name in several.split(", ")]
    raise ConfigError(
        f"class {label}: must be a name, or a number from 0 to {len(spec.classes) - 1}{nearest(label, names)}"
    )


def check_prompts(spec: PipelineSpec, prompts: Sequence[str]) -> None:
    """Make sure that there are prompts, or classes, exactly where the pipeline takes them.

    Args:
        spec: The pipeline.
        prompts: The prompts or the classes.

    Raises:
        ConfigError: If they are missing, or given to a pipeline that takes none, or if there is no such class.
    """
    if bool(spec.tokenizers or spec.classes) != bool(prompts):
        wanted = "--class_label" if spec.classes else "--prompt"
        fix = f"drop {wanted}" if prompts else f"give at least one {wanted}"
        raise ConfigError(f"a {spec.kind} with {len(prompts)} {'classes' if spec.classes else 'prompts'}: {fix}")
    for label in prompts if spec.classes else ():
        class_number(spec, label)


def is_guided(spec: PipelineSpec, prompts: Sequence[str], guidance_scale: float) -> bool:
    """Return whether samples are guided, for which there must be something to guide away from.

    Args:
        spec: The pipeline.
        prompts: The prompts or the classes; there is no guidance without.
        guidance_scale: Scale of classifier-free guidance; 1 or less turns it off.

    Raises:
        ConfigError: If a model of classes has no null class.
    """
    guided = bool(prompts) and guidance_scale > 1
    if guided and spec.classes and spec.null_class is None:
        raise ConfigError(
            f"--guidance_scale {guidance_scale}: the model has no null class, which guidance leads away from: give 1"
        )
    return guided


def guidance_scales(
    spec: PipelineSpec, timesteps: np.ndarray, scale: float, interval: Sequence[float] = ()
) -> np.ndarray:
    """Return the scale of guidance at each step of a sampler.

    Args:
        spec: The pipeline.
        timesteps: What the denoiser is told at each step, (steps,).
        scale: Scale of classifier-free guidance.
        interval: Lowest and highest noise level at which samples are guided, as `Objective.noise_levels` gives them;
            empty for all.

    Returns:
        float32 (steps,): `scale` in the interval, and outside of it 1, which does not guide.

    Reference:
        Kynkäänniemi et al., https://arxiv.org/abs/2404.07724, equation 6.
    """
    scales = np.full(len(timesteps), scale, np.float32)
    if interval:
        levels = spec.objective.noise_levels(timesteps, spec.scheduler)
        scales[(levels < interval[0]) | (levels > interval[1])] = 1
    return scales


class Begin(NamedTuple):
    """What pictures are drawn over, instead of from noise.

    Attributes:
        pixels: The pictures, float32 (prompts, C, H, W) in [-1, 1]; or one for all prompts, (1, C, H, W).
        first_step: Number of denoising steps that are left out.
    """

    pixels: np.ndarray
    first_step: int

    def at(self, places: np.ndarray) -> Begin:
        """Return that of the pictures of a batch, by the places of their prompts, (B,)."""
        return self._replace(pixels=self.pixels[np.minimum(places, len(self.pixels) - 1)])


def sampler_config(spec: PipelineSpec, chosen: str | None = None) -> dict[str, Any]:
    """Return the config of the scheduler that draws from a pipeline; see `samplers.sampler_config`.

    Args:
        spec: The pipeline.
        chosen: Name of the sampler that the user asks for instead, if any.

    Raises:
        ConfigError: As that one, and for a sampler that takes a variance which the model does not predict.
    """
    config = samplers.sampler_config(spec.scheduler, chosen)
    name = samplers.in_place(config, chosen)[0] if chosen else samplers.class_name(config)
    if samplers.takes_variance(name, config) and not learns_variance(spec.denoiser):
        raise ConfigError(
            f"scheduler config: variance_type {config['variance_type']} takes a variance, and this model predicts "
            "none: set it to fixed_small, or choose another --scheduler"
        )
    return config
