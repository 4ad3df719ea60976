"""Images from a pipeline folder: `python -m flax_diffusion.generate --model DIR [--prompt …] [flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from flax_diffusion.core import cli


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


def generate(model: str | Path, **options: Any) -> np.ndarray:
    """Draws images.

    Args:
        model: Folder or Hub id of a Diffusers pipeline.
        options: Any flag of the command line but `output_dir`, by the same name.

    Returns:
        uint8 images (n, height, width, channels), prompt by prompt.

    Raises:
        UserError: For input that cannot be used; its text is one line with the fix.
    """
    values = {"model": str(model)} | options
    if isinstance(values.get("prompt"), str):
        values["prompt"] = [values["prompt"]]
    return _run(cli.build(GenerateConfig, values, "generate"))


def _run(config: GenerateConfig) -> np.ndarray:
    from flax_diffusion.core import pipeline
    from flax_diffusion.modules import build_modules, load_pretrained
    from flax_diffusion.sampling import Sampler
    from flax_diffusion.schedulers import scheduler_from_config
    from flax_diffusion.sharding import make_mesh, put_replicated

    spec = pipeline.open_pipeline(config.model, config.revision, config.variant)
    modules = build_modules(spec, config.mixed_precision)
    mesh = make_mesh(-1, 1)
    sampler = Sampler(modules, scheduler_from_config(spec.scheduler, kind=config.scheduler), mesh)
    sampler.check_prompts(config.prompt)
    params = {name: put_replicated(load_pretrained(part), mesh) for name, part in spec.components.items()}
    return sampler(
        params,
        prompts=config.prompt,
        negative_prompt=config.negative_prompt,
        num_images=config.num_images,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        batch_size=config.batch_size,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line: writes 00000.png, 00001.png, … and grid.png."""
    from flax_diffusion.core.tracking import enlarge, image_grid, to_pillow

    parser = cli.Parser(prog="python -m flax_diffusion.generate", description="Draw images from a trained pipeline.")
    cli.add_fields(parser, GenerateConfig)
    config = cli.build(GenerateConfig, parser.parse(sys.argv[1:] if argv is None else argv), "command line")
    images = _run(config)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        to_pillow(image).save(folder / f"{number:05d}.png")
    columns = config.num_images if config.prompt else None
    enlarge(image_grid(images, columns, border=max(1, images.shape[1] // 32)), 512).save(folder / "grid.png")
    sys.stderr.write(f"{len(images)} images and grid.png are in {folder}\n")


if __name__ == "__main__":
    cli.main_guard(main)
