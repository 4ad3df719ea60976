"""Pictures beside the prompts: what a ControlNet follows, what is to be filled in, and what is drawn over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flax_diffusion.core.data.extra import CONDITIONING_IMAGE, conditioning_images, images_to_fill
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.spec.pipeline import PipelineSpec

CONDITIONING, IMAGE, MASK_IMAGE = "conditioning_image", "image", "mask_image"
INIT_IMAGE = "init_image"
OPTIONS = (CONDITIONING, IMAGE, MASK_IMAGE)
"""Options of drawing that name pictures of which the denoiser is told."""

_MEANING = {CONDITIONING: "the picture to follow", IMAGE: "the picture to fill in", MASK_IMAGE: "what to fill in"}


def check_given(spec: PipelineSpec, given: Mapping[str, Sequence[str]], prompts: int) -> None:
    """Make sure that there are pictures exactly where the pipeline takes them.

    Args:
        spec: The pipeline.
        given: Names of the pictures, by option.
        prompts: Number of prompts.

    Raises:
        ConfigError: If pictures are missing, not taken, or of another number than the prompts.
    """
    follows, fills = bool(spec.names_of(Role.CONTROL)), spec.fills_in
    for option, needed in {CONDITIONING: follows, IMAGE: fills, MASK_IMAGE: fills}.items():
        count = len(given[option])
        if needed and not count:
            why = "has a ControlNet" if option == CONDITIONING else "fills in pictures"
            raise ConfigError(f"the model {why}: give {_MEANING[option]} by --{option}")
        if count and not needed:
            raise ConfigError(f"--{option}: the model takes no such picture; drop it")
        _check_count(option, count, prompts)


def _check_count(option: str, count: int, prompts: int) -> None:
    if count not in (0, 1, prompts):
        raise ConfigError(f"--{option} are {count}, for {prompts} prompts: give one for each, or one for all")


def check_begun(spec: PipelineSpec, names: Sequence[str], prompts: int) -> None:
    """Make sure that a pipeline can draw over pictures.

    Args:
        spec: The pipeline.
        names: Names of the pictures; none for drawing from noise.
        prompts: Number of prompts.

    Raises:
        ConfigError: If the pipeline has another way to be given pictures, or they are of another number than prompts.
    """
    if names and spec.fills_in:
        raise ConfigError(f"--{INIT_IMAGE}: the model fills in the picture of --{IMAGE}; drop it")
    _check_count(INIT_IMAGE, len(names), prompts)


def read_given(
    spec: PipelineSpec, given: Mapping[str, Sequence[str]], prompts: int, seed: int
) -> dict[str, np.ndarray] | None:
    """Read the pictures.

    Args:
        spec: The pipeline, with the size to draw.
        given: Names of the pictures, by option, as `check_given` takes them.
        prompts: Number of prompts.
        seed: Seed of the noise that samples the latents of what is not filled in.

    Returns:
        Arrays (prompts, …) by their name in a batch; None where there are no pictures.

    Raises:
        DataError: If one cannot be read, or a mask is of another size than its picture.
    """
    size = spec.size or (spec.resolution, spec.resolution)
    for_each = {option: [*names] * (prompts // len(names)) for option, names in given.items() if names}
    if CONDITIONING in for_each:
        return {CONDITIONING_IMAGE: conditioning_images(f"--{CONDITIONING}", for_each[CONDITIONING], size)}
    if IMAGE in for_each:
        options = {f"--{option}": for_each[option] for option in (IMAGE, MASK_IMAGE)}
        return images_to_fill(options, size, spec.sample_shape if spec.vae else None, seed)
    return None
