"""The prompts whose pictures show the progress of a run."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from pydantic import Field, model_validator

from flax_diffusion.core.config.options import also
from flax_diffusion.core.config.prompt_file import Prompt, read_prompts
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError, nearest_multiples
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.common.diffusion import DiffusionConfig, DiffusionTask
from flax_diffusion.core.tasks.task import Preview

PREVIEWED = 4
"""Most prompts that are drawn during training where no option names some."""


class PreviewedConfig(DiffusionConfig):
    """Options of tasks that draw prompts during training."""

    validation_prompts: list[str] = Field(
        [],
        validation_alias=also("validation_prompts", "validation_prompt"),
        description="Prompts to draw during training. None: some of those that it trains on.",
    )
    validation_prompts_file: str | None = Field(
        None, description="File of prompts to draw during training, each with options of its own, as of `generate`."
    )
    validation_guidance_scale: float = Field(7.5, ge=0, description="Guidance scale of these samples.")

    @model_validator(mode="after")
    def _check_previews(self) -> PreviewedConfig:
        if self.validation_prompts and self.validation_prompts_file is not None:
            raise ValueError("--validation_prompts and --validation_prompts_file: drop one of them")
        return self


P = TypeVar("P", bound=PreviewedConfig, covariant=True)


class PreviewedTask(DiffusionTask[P]):
    """Training that draws prompts."""

    previews_of_one_size: bool = False
    """Whether previews follow pictures at the resolution of training, so that prompts have no size of their own."""

    @functools.cached_property
    def validation_prompts(self) -> list[Prompt]:
        """The prompts of the options, with the options of each.

        Raises:
            ConfigError: If their file cannot be read.
        """
        if self.config.validation_prompts_file is not None:
            return read_prompts(self.config.validation_prompts_file, "validation_prompts_file")
        return [Prompt(prompt=prompt) for prompt in self.config.validation_prompts]

    @property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts among the options, by option."""
        option = "validation_prompts" if self.config.validation_prompts_file is None else "validation_prompts_file"
        return {option: [prompt.prompt for prompt in self.validation_prompts]}

    def checked(self, spec: PipelineSpec) -> PipelineSpec:
        """Return a pipeline that can be trained with the options, and that can draw their prompts."""
        for prompt in self.validation_prompts:
            where = f"--validation_prompts_file {self.config.validation_prompts_file}, '{prompt.prompt}'"
            for side in filter(None, (prompt.height, prompt.width)):
                if self.previews_of_one_size:
                    raise ConfigError(f"{where}: is drawn at --resolution {self.config.resolution}; drop its size")
                if side % spec.size_factor:
                    raise ConfigError(
                        f"{where}: {side} pixels must be a multiple of {spec.size_factor}, which autoencoder and UNet "
                        f"divide them by: {nearest_multiples(side, spec.size_factor)}"
                    )
        return super().checked(spec)

    def make_preview(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Draw pictures of the validation prompts, a row for each."""
        prompts = self.previewed_prompts(source)
        return self.preview_of(prompts) if prompts else None

    def previewed_prompts(self, source: Source) -> list[Prompt]:
        """Return the prompts to draw during training: those of the options, or `PREVIEWED` at most that it trains on.

        Args:
            source: The examples.
        """
        return self.validation_prompts or [Prompt(prompt=text) for text in self.trained_prompts(source)[:PREVIEWED]]

    def preview_of(self, prompts: Sequence[Prompt], extra: Mapping[str, np.ndarray] | None = None) -> Preview:
        """Return the preview of some prompts.

        Args:
            prompts: The prompts.
            extra: As of `Backend.sample`.
        """
        own = [] if self.config.validation_prompts_file is None else [prompt.given() for prompt in prompts]
        texts, scale = [prompt.prompt for prompt in prompts], self.config.validation_guidance_scale
        return self._samples(texts, scale, self.config.eval_batch_size, extra, own=own)

    @abstractmethod
    def trained_prompts(self, source: Source) -> list[str]:
        """Return some prompts that the run trains on.

        Args:
            source: The examples.
        """
