"""The command that draws images from a pipeline folder, for either backend: options, files and messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flax_diffusion.core import cli
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.files import as_path
from flax_diffusion.core.pipeline import PipelineSpec, check_prompts, open_pipeline


class GenerateConfig(BaseModel):
    """Options of `generate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Folder or Hub id of a Diffusers pipeline, such as the output_dir of a run.")
    prompt: list[str] = Field([], description="Texts to draw; each gets num_images images.")
    negative_prompt: str = Field("", description="Text to guide away from.")
    num_images: int = Field(1, ge=1, description="Images to draw (a prompt).")
    seed: int = Field(0, ge=0, lt=2**32, description="Of all noise. Image i of a seed is always the same.")
    num_inference_steps: int = Field(50, ge=1, description="Denoising steps.")
    guidance_scale: float = Field(7.5, ge=0, description="Classifier-free guidance; 1 turns it off.")
    scheduler: Literal["ddpm", "ddim", "pndm", "euler", "dpm++"] | None = Field(
        None, description="Sampler. None: the pipeline's own."
    )
    batch_size: int = Field(16, ge=1, description="Images at a time; changes speed and memory, not the images.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="Compute precision.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    variant: str | None = Field(None, description="Variant of its weight files, e.g. fp16.")
    output_dir: str = Field("images", description="Folder for the PNG files and the grid.")


def options_of(model: str | Path, options: dict[str, Any]) -> GenerateConfig:
    """The options of a call from Python; one prompt may be a plain string.

    Raises:
        ConfigError: For unknown names and wrong values.
    """
    values = {"model": str(model)} | options
    if isinstance(values.get("prompt"), str):
        values["prompt"] = [values["prompt"]]
    return cli.build(GenerateConfig, values, "generate")


def open_checked(config: GenerateConfig) -> PipelineSpec:
    """Reads the pipeline's configs, and checks that the prompts go with it.

    Raises:
        UserError: If it is no pipeline, or the prompts do not fit.
    """
    spec = open_pipeline(config.model, config.revision, config.variant)
    check_prompts(spec, config.prompt)
    return spec


def sampler_options(config: GenerateConfig) -> dict[str, Any]:
    """What the samplers of both backends take from the options."""
    names = ("prompt", "negative_prompt", "num_images", "num_inference_steps", "guidance_scale", "seed", "batch_size")
    return {{"prompt": "prompts"}.get(name, name): getattr(config, name) for name in names}


def main(draw: Callable[[GenerateConfig], np.ndarray], prog: str, argv: Sequence[str] | None) -> None:
    """Runs the command line: writes 00000.png, 00001.png, … and grid.png."""
    parser = cli.Parser(prog=prog, description="Draw images from a trained pipeline.")
    cli.add_fields(parser, GenerateConfig)
    config = cli.build(GenerateConfig, parser.parse(sys.argv[1:] if argv is None else argv), "command line")
    folder = as_path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be made: {error.strerror}") from error
    images = draw(config)

    from flax_diffusion.core.tracking import enlarge, image_grid, save_picture, to_pillow

    for number, image in enumerate(images):
        save_picture(to_pillow(image), folder / f"{number:05d}.png")
    columns = config.num_images if config.prompt else None
    grid = image_grid(images, columns, border=max(1, images.shape[1] // 32))
    save_picture(enlarge(grid, 512), folder / "grid.png")
    sys.stderr.write(f"{len(images)} images and grid.png are in {folder}\n")
