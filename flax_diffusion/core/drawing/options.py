"""Options of `generate`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.prompt_file import MAX_SIDE, read_prompts
from flax_diffusion.core.config.spellings import option_words
from flax_diffusion.core.drawing.pictures import OPTIONS
from flax_diffusion.core.errors import ConfigError

ALL = "all"
"""The --class_label that stands for all classes."""
STRENGTH = 0.8
"""Usual share of a picture that is drawn over, that of Diffusers' StableDiffusionImg2ImgPipeline."""
PROMPT_GUIDANCE, CLASS_GUIDANCE = 7.5, 4.0
"""Usual scales of guidance, those of Diffusers' StableDiffusionPipeline and DiTPipeline."""
OUTPUT = ("output_dir", "overwrite_output_dir")
"""Options that say where the pictures go, and change none."""


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
    prompts_file: str | None = Field(
        None,
        description="File of prompts, one a line, each with options of its own: `a dog --w 768 --h 512 --s 30 --g 7 "
        '--seed 1 --n "a cat"`. Or a .yaml file with a list of them.',
    )
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
    init_image: list[str] = Field(
        [], description="Pictures to draw over: one for each prompt, or one for all. Their centre is cut to the size."
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How much of init_image is drawn over: the share of the denoising steps that is taken, from just "
        "above 0 for next to nothing to 1 for nearly all. None: 0.8.",
    )
    num_images: int = Field(1, ge=1, description="Images to draw (per prompt or class).")
    height: int | None = Field(None, ge=1, le=MAX_SIDE, description="Height in pixels. None: the pipeline's own.")
    width: int | None = Field(None, ge=1, le=MAX_SIDE, description="Width in pixels. None: the pipeline's own.")
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

    @model_validator(mode="after")
    def _check_strength(self) -> GenerateConfig:
        if self.strength is not None and not self.init_image:
            raise ValueError("--strength goes with --init_image: add it, or drop the former")
        return self

    @model_validator(mode="after")
    def _check_prompts(self) -> GenerateConfig:
        if self.prompts_file is not None:
            for name in ("prompt", *OPTIONS):
                if getattr(self, name):
                    raise ValueError(f"--{name} and --prompts_file: drop one of them")
        return self


def calls_of(config: GenerateConfig) -> list[GenerateConfig]:
    """Return the calls that a call is made of: one for each prompt of its file, which is read here, or the call itself.

    Args:
        config: The options.

    Raises:
        ConfigError: If the file of prompts cannot be read.
    """
    if config.prompts_file is None:
        return [config]
    prompts = read_prompts(config.prompts_file, "prompts_file")
    own = [{"prompts_file": None, "prompt": [prompt.prompt]} | prompt.given() for prompt in prompts]
    return [config.model_copy(update=values) for values in own]


def check_one_size(config: GenerateConfig, calls: list[GenerateConfig]) -> list[GenerateConfig]:
    """Return calls whose pictures have one size, as one array of them needs.

    Args:
        config: The options.
        calls: The calls that they are; see `calls_of`.

    Raises:
        ConfigError: If the prompts of its file have several sizes.
    """
    if len({(call.width, call.height) for call in calls}) > 1:
        raise ConfigError(
            f"--prompts_file {config.prompts_file}: pictures of several sizes do not go into one array; write one size "
            "for all, or draw them by the command line"
        )
    return calls


def options_of(model: str | Path, options: dict[str, Any]) -> GenerateConfig:
    """Return the checked options of a call from Python; a single prompt, LoRA or new word may be a plain string.

    Args:
        model: Folder or Hub id of the model.
        options: Values by option.

    Raises:
        ConfigError: For unknown names and wrong values.
    """
    values = {"model": str(model)} | options
    for name in ("prompt", "class_label", "lora", "embeddings", "init_image", *OPTIONS):
        if isinstance(values.get(name), str | os.PathLike):
            values[name] = [values[name]]
    return command_line.build(GenerateConfig, values, "generate")


def command_of(config: GenerateConfig, prog: str) -> str:
    """Return the command that draws the pictures of a call again.

    Args:
        config: The options.
        prog: Name of the command.
    """
    values = config.model_dump(mode="json", exclude={*OUTPUT})
    return " ".join([prog, shlex.join(option_words(GenerateConfig, values))])
