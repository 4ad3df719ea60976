"""The command that draws images from a pipeline folder, for either backend: options, files and messages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.extra import check_there, images_to_draw_over
from flax_diffusion.core.display import console
from flax_diffusion.core.drawing.files import GRID, earlier_pictures, free_folder, write
from flax_diffusion.core.drawing.models import open_model
from flax_diffusion.core.drawing.options import ALL, CLASS_GUIDANCE, PROMPT_GUIDANCE, STRENGTH, GenerateConfig, calls_of
from flax_diffusion.core.drawing.pictures import INIT_IMAGE, OPTIONS, check_begun, check_given, read_given
from flax_diffusion.core.errors import ConfigError, naming, nearest_multiples
from flax_diffusion.core.objectives.objective import find
from flax_diffusion.core.objectives.samplers import beginning_in_the_middle, first_step
from flax_diffusion.core.spec.merging import Shapes, with_adapters
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.spec.prompts import Begin, check_prompts, is_guided

log = logging.getLogger(__name__)


def open_checked(config: GenerateConfig, calls: Sequence[GenerateConfig], shapes: Shapes) -> PipelineSpec:
    """Read a pipeline's configs, LoRA and new words, and check that size and prompts fit the pipeline.

    Args:
        config: The options.
        calls: The calls that they are; see `calls_of`.
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
    for call in calls:
        with naming(f"--prompts_file, '{call.prompt[0]}'") if config.prompts_file else nullcontext():
            _check_prompts(call, spec)
            check_given(spec, _pictures(call), len(call.prompt))
            check_begun(spec, call.init_image, len(prompts_of(call, spec)))
            if call.init_image:
                _first_step(call)
            for option, names in {**_pictures(call), INIT_IMAGE: call.init_image}.items():
                check_there(f"--{option}", names)
            _check_size(call, spec)
    spec = with_adapters(spec, shapes, config.lora, config.lora_scale, config.embeddings)
    tokenize = spec.tokenize
    for prompt in dict.fromkeys(text for call in calls for text in (*call.prompt, call.negative_prompt)):
        if tokenize is not None and (rest := tokenize.cut_off(prompt)):
            log.warning("the text encoder takes %d tokens: cut off is '%s' of '%s'", tokenize.length, rest, prompt)
    return spec


def _check_size(config: GenerateConfig, spec: PipelineSpec) -> None:
    for name, side in (("height", config.height), ("width", config.width)):
        if side and side % spec.size_factor:
            raise ConfigError(
                f"--{name} {side}: must be a multiple of {spec.size_factor}, which autoencoder and UNet divide it by: "
                f"{nearest_multiples(side, spec.size_factor)}"
            )


def _size(config: GenerateConfig, spec: PipelineSpec) -> tuple[int, int]:
    """Return height and width of the pictures of a call, in pixels."""
    height, width = spec.size or (spec.resolution, spec.resolution)
    return config.height or height, config.width or width


def sampler_options(config: GenerateConfig, spec: PipelineSpec) -> dict[str, Any]:
    """Return the options that the samplers of both backends take.

    Args:
        config: The options of one of `calls_of`.
        spec: The pipeline.

    Raises:
        DataError: If a picture cannot be read.
    """
    names = ("negative_prompt", "num_images", "num_inference_steps", "guidance_interval", "seed", "batch_size")
    options = {name: getattr(config, name) for name in names}
    size = _size(config, spec)
    spec = replace(spec, size=size)
    options |= {"prompts": prompts_of(config, spec), "guidance_scale": guidance_scale(config, spec), "size": size}
    if config.init_image:
        pixels = images_to_draw_over(f"--{INIT_IMAGE}", config.init_image, size, spec.image_channels)
        options |= {"begin": Begin(pixels, _first_step(config))}
    extra = read_given(spec, _pictures(config), len(config.prompt), config.seed)
    return options if extra is None else options | {"extra": extra}


def _first_step(config: GenerateConfig) -> int:
    return first_step(config.num_inference_steps, config.strength or STRENGTH)


def scheduler_of(config: GenerateConfig, spec: PipelineSpec) -> str | None:
    """Return the name of the sampler that is asked for, or that can draw over pictures; None for the pipeline's own.

    Args:
        config: The options.
        spec: The pipeline.

    Raises:
        ConfigError: If the one that is asked for cannot draw over pictures.
    """
    return beginning_in_the_middle(spec.scheduler, config.scheduler) if config.init_image else config.scheduler


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


def main(
    draw: Callable[[GenerateConfig, Sequence[GenerateConfig]], Iterator[np.ndarray]],
    prog: str,
    argv: Sequence[str] | None,
) -> None:
    """Run the command line, which writes 00000.png, 00001.png, … as they are drawn, and grid.png.

    Args:
        draw: Opens the model of the options, and then draws the pictures of calls, a batch at a time, each uint8
            (N, H, W, C).
        prog: Name of the command, for its help.
        argv: The words of the command line; None for those of this process.

    Raises:
        UserError: For input that cannot be used.
    """
    parser = command_line.Parser(prog=prog, description="Draw images from a trained pipeline.")
    command_line.add_fields(parser, GenerateConfig)
    config = command_line.build(GenerateConfig, parser.parse(sys.argv[1:] if argv is None else argv), "command line")
    calls = calls_of(config)
    folder = free_folder(config)
    with console.current().ticking():
        with console.current().doing("loading the model"):
            batches = draw(config, calls)
        for path in earlier_pictures(folder):
            path.unlink()
        count = write(batches, folder, calls, prog)
    sys.stderr.write(f"{count} images and {GRID} are in {folder}\n")
