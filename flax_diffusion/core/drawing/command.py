"""The command that draws images from a pipeline folder, for either backend: options, files and messages."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.drawing.models import open_model
from flax_diffusion.core.drawing.pictures import OPTIONS, check_given, read_given
from flax_diffusion.core.errors import ConfigError, naming, nearest_multiples
from flax_diffusion.core.io.files import as_path, replacing
from flax_diffusion.core.objectives.objective import find
from flax_diffusion.core.spec.merging import Shapes, with_adapters
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.spec.prompts import check_prompts, is_guided

log = logging.getLogger(__name__)

GRID = "grid.png"
ALL = "all"
"""The --class_label that stands for all classes."""
PROMPT_GUIDANCE, CLASS_GUIDANCE = 7.5, 4.0
"""Usual scales of guidance, those of Diffusers' StableDiffusionPipeline and DiTPipeline."""
_WRITTEN = re.compile(r"\d{5,}\.png")
_ROOM_BYTES = 2**20  # about the size of a picture


class GenerateConfig(BaseModel):
    """Options of `generate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="Folder or Hub id of a Diffusers pipeline, such as the output_dir of a run. Or a run of LoRA or "
        "textual inversion, or a checkpoint in a run."
    )
    lora: list[str] = Field([], description="LoRA files to draw with, each as PATH or PATH:STRENGTH.")
    lora_scale: FiniteFloat = Field(1.0, description="Strength of all LoRA files, which multiplies each one's own.")
    embeddings: list[str] = Field([], description="Files of textual inversion, each as PATH or PATH:WORD.")
    prompt: list[str] = Field([], description="Texts to draw. Each gets num_images images.")
    class_label: list[str] = Field(
        [],
        description="Classes to draw, by name or number, or `all`, for models of classes. Each gets num_images images.",
    )
    negative_prompt: str = Field("", description="Text to guide away from.")
    conditioning_image: list[str] = Field(
        [], description="Pictures that a ControlNet follows: one for each prompt, or one for all."
    )
    image: list[str] = Field(
        [], description="Pictures that an inpainting model fills in: one for each prompt, or one for all."
    )
    mask_image: list[str] = Field([], description="Their masks: the light parts are filled in.")
    num_images: int = Field(1, ge=1, description="Images to draw (per prompt or class).")
    height: int | None = Field(None, ge=1, le=2**14, description="Height in pixels. None: the pipeline's own.")
    width: int | None = Field(None, ge=1, le=2**14, description="Width in pixels. None: the pipeline's own.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of all noise. Image i of a seed is always the same.")
    num_inference_steps: int = Field(50, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None,
        ge=0,
        description="Scale of classifier-free guidance. 1 turns it off. None: 7.5 for prompts, 4 for classes.",
    )
    guidance_interval: list[float] = Field(
        [],
        description="Lowest and highest noise level at which samples are guided: shares of the training timesteps, "
        "from 0 for no noise to 1; of EDM, sigmas. None: all.",
    )
    objective: str | None = Field(
        None,
        description="Objective of your own that the model was trained by, as module:Class, where the model's folder "
        "names a scheduler of its own.",
    )
    scheduler: Literal["ddpm", "ddim", "pndm", "euler", "lms", "dpm++", "flow_match", "edm", "heun", "sde"] | None = (
        Field(
            None,
            description="Sampler. None: the pipeline's own. heun, of flow matching and EDM, evaluates the model twice "
            "in each step but the last; sde, of flow matching, adds noise in each step but the last.",
        )
    )
    batch_size: int = Field(16, ge=1, description="Images drawn at a time. The images do not depend on it.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="Precision of the computation.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub id.")
    variant: str | None = Field(None, description="Variant of the weight files, such as fp16.")
    output_dir: str = Field("images", description="Folder for the PNG files and the grid.")
    overwrite_output_dir: bool = Field(False, description="Delete the pictures of an earlier call in that folder.")

    @model_validator(mode="after")
    def _check_interval(self) -> GenerateConfig:
        levels = self.guidance_interval
        if levels and (len(levels) != 2 or not 0 <= levels[0] < levels[1]):
            raise ValueError(
                f"--guidance_interval {' '.join(map(str, levels))}: give two noise levels, the lower one first, such "
                "as 0 0.7"
            )
        return self


def options_of(model: str | Path, options: dict[str, Any]) -> GenerateConfig:
    """Return the checked options of a call from Python; a single prompt, LoRA or new word may be a plain string.

    Args:
        model: Folder or Hub id of the model.
        options: Values by option.

    Raises:
        ConfigError: For unknown names and wrong values.
    """
    values = {"model": str(model)} | options
    for name in ("prompt", "class_label", "lora", "embeddings", *OPTIONS):
        if isinstance(values.get(name), str | Path):
            values[name] = [str(values[name])]
    return command_line.build(GenerateConfig, values, "generate")


def open_checked(config: GenerateConfig, shapes: Shapes) -> PipelineSpec:
    """Read a pipeline's configs, LoRA and new words, and check that size and prompts fit the pipeline.

    Args:
        config: The options.
        shapes: Gives the shapes of a pipeline's parameters, with the backend that draws.

    Returns:
        The pipeline.

    Raises:
        UserError: If the model is no pipeline, or something does not fit it.
    """
    asked = find(config.objective) if config.objective else None
    spec = open_model(config.model, shapes, config.revision, config.variant)
    if asked is not None and asked is not spec.objective:
        raise ConfigError(
            f"--objective {config.objective}: this model was trained by {spec.objective.name}; name that one, or none"
        )
    if spec.objective.sample is not None and config.guidance_interval:
        raise ConfigError(f"--guidance_interval: {spec.objective.name} draws by its own sample, all of it; drop it")
    spec.family.check_drawing(spec)
    _check_prompts(config, spec)
    check_given(spec, _pictures(config), len(config.prompt))
    spec = with_adapters(spec, shapes, config.lora, config.lora_scale, config.embeddings)
    height, width = spec.size or (spec.resolution, spec.resolution)
    spec = replace(spec, size=(config.height or height, config.width or width))
    for name, side in (("height", config.height), ("width", config.width)):
        if side and side % spec.size_factor:
            raise ConfigError(
                f"--{name} {side}: must be a multiple of {spec.size_factor}, which autoencoder and UNet divide it by: "
                f"{nearest_multiples(side, spec.size_factor)}"
            )
    tokenize = spec.tokenize
    for prompt in dict.fromkeys((*config.prompt, config.negative_prompt)):
        if tokenize is not None and (rest := tokenize.cut_off(prompt)):
            log.warning("the text encoder takes %d tokens: cut off is '%s' of '%s'", tokenize.length, rest, prompt)
    return spec


def sampler_options(config: GenerateConfig, spec: PipelineSpec) -> dict[str, Any]:
    """Return the options that the samplers of both backends take.

    Args:
        config: The options.
        spec: The pipeline.

    Raises:
        DataError: If a picture cannot be read.
    """
    names = ("negative_prompt", "num_images", "num_inference_steps", "guidance_interval", "seed", "batch_size")
    options = {name: getattr(config, name) for name in names}
    options |= {"prompts": prompts_of(config, spec), "guidance_scale": guidance_scale(config, spec)}
    extra = read_given(spec, _pictures(config), len(config.prompt), config.seed)
    return options if extra is None else options | {"extra": extra}


def _check_prompts(config: GenerateConfig, spec: PipelineSpec) -> None:
    """Raise ConfigError for prompts or classes that a pipeline does not take."""
    given, other = ("class_label", "prompt") if spec.classes else ("prompt", "class_label")
    if getattr(config, other):
        raise ConfigError(f"--{other}: a {spec.kind} is not told one; drop it")
    if spec.classes and config.negative_prompt:
        raise ConfigError(f"--negative_prompt: a {spec.kind} is told classes, and is guided away from any; drop it")
    with naming(f"--{given}") if spec.classes else nullcontext():
        check_prompts(spec, prompts_of(config, spec))
    if not is_guided(spec, prompts_of(config, spec), guidance_scale(config, spec)) and config.guidance_interval:
        raise ConfigError("--guidance_interval goes with a --guidance_scale above 1: add it, or drop the former")


def prompts_of(config: GenerateConfig, spec: PipelineSpec) -> list[str]:
    """Return the prompts, or the classes by name or number, whose pictures are drawn.

    Args:
        config: The options.
        spec: The pipeline.
    """
    if spec.classes and config.class_label == [ALL]:
        return [str(number) for number in range(len(spec.classes))]
    return config.class_label if spec.classes else config.prompt


def guidance_scale(config: GenerateConfig, spec: PipelineSpec) -> float:
    """Return the scale of guidance, which is the usual one where none is given.

    Args:
        config: The options.
        spec: The pipeline.
    """
    if config.guidance_scale is not None:
        return config.guidance_scale
    return CLASS_GUIDANCE if spec.classes else PROMPT_GUIDANCE


def _pictures(config: GenerateConfig) -> dict[str, list[str]]:
    return {name: getattr(config, name) for name in OPTIONS}


def main(draw: Callable[[GenerateConfig], Iterator[np.ndarray]], prog: str, argv: Sequence[str] | None) -> None:
    """Run the command line, which writes 00000.png, 00001.png, … as they are drawn, and grid.png.

    Args:
        draw: Opens the model, and then draws a batch of pictures at a time, each uint8 (N, H, W, C).
        prog: Name of the command, for its help.
        argv: The words of the command line; None for those of this process.

    Raises:
        UserError: For input that cannot be used.
    """
    parser = command_line.Parser(prog=prog, description="Draw images from a trained pipeline.")
    command_line.add_fields(parser, GenerateConfig)
    config = command_line.build(GenerateConfig, parser.parse(sys.argv[1:] if argv is None else argv), "command line")
    folder = _free_folder(config)
    batches = draw(config)
    for path in _earlier_pictures(folder):
        path.unlink()
    count = _write(batches, folder, config.num_images if config.prompt or config.class_label else None)
    sys.stderr.write(f"{count} images and {GRID} are in {folder}\n")


def _earlier_pictures(folder: Path) -> list[Path]:
    """Return the pictures that an earlier call has written."""
    if not folder.is_dir():  # in an object store a folder exists only when something is in it
        return []
    return sorted(path for path in folder.iterdir() if _WRITTEN.fullmatch(path.name) or path.name == GRID)


def _free_folder(config: GenerateConfig) -> Path:
    """Return the output folder, once it can be written and holds no pictures that would mix with the new ones.

    Raises:
        ConfigError: If it cannot be written, or holds pictures of an earlier call.
    """
    folder = as_path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder}: cannot be made: {error.strerror}; name another folder") from error
    before = _earlier_pictures(folder)
    if before and not config.overwrite_output_dir:
        raise ConfigError(
            f"--output_dir {folder}: holds {before[0].name} of an earlier call, and {len(before) - 1} more: name "
            "another folder, or delete them by --overwrite_output_dir"
        )
    probe = folder / ".room"
    try:
        with replacing(probe) as partial:
            partial.write_bytes(bytes(_ROOM_BYTES))
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder}: cannot be written: {error.strerror or error}; make room, or name another folder"
        ) from error
    return folder


def _write(batches: Iterator[np.ndarray], folder: Path, columns: int | None) -> int:
    """Write pictures as they are drawn, then the grid, and return the number of pictures.

    Raises:
        ConfigError: If one cannot be written; those before it stay.
    """
    from flax_diffusion.core.io.tracking import enlarge, image_grid, save_picture, to_pillow

    images: list[np.ndarray] = []
    name = ""
    try:
        for batch in batches:
            for image in batch:
                name = f"{len(images):05d}.png"
                save_picture(to_pillow(image), folder / name)
                images.append(image)
        grid, name = image_grid(np.stack(images), columns, border=max(1, images[0].shape[0] // 32)), GRID
        save_picture(enlarge(grid, 512), folder / GRID)
    except OSError as error:
        raise ConfigError(
            f"--output_dir {folder}: {name} could not be written: {error.strerror or error}; the {len(images)} "
            "pictures before it are there"
        ) from error
    return len(images)
