"""What a family of models is: its pipelines, the models in them, and their names on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from flax_diffusion.core.registry import Registry

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import PipelineSpec

GROUP = "flax_diffusion.core"


class Role(StrEnum):
    """What a model does in a pipeline."""

    DENOISER = "denoiser"
    AUTOENCODER = "autoencoder"
    TEXT_ENCODER = "text encoder"
    CONTROL = "control network"


@dataclass(frozen=True, kw_only=True)
class ModelClass:
    """A class of models.

    Attributes:
        name: Of the PyTorch class, which a config.json names.
        role: What such a model does in a pipeline.
        library: That has the PyTorch class.
        schema: A class whose annotations are the config keys that are read before there is a model, and whose
            attributes are their defaults, as in the library.
    """

    name: str
    role: Role
    library: Literal["diffusers", "transformers"] = "diffusers"
    schema: type


@dataclass(frozen=True, kw_only=True)
class PipelineClass:
    """A class of pipelines, as model_index.json names it.

    Attributes:
        parts: Model classes by component, which is also the name of its subfolder.
        tokenizers: Text encoders by the name of their tokenizer's subfolder.
        scheduler: Keys of the scheduler's config where it is ours to choose.
        index: Entries of model_index.json beside the parts that are there.
    """

    parts: Mapping[str, ModelClass]
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SingleFileLayout:
    """How a whole pipeline lies in one file of the original code.

    Attributes:
        prefixes: Of the names of each component's tensors.
        open_clip: Start of the names by which a text encoder is OpenCLIP's.
        renamers: Makes, of a pipeline and whether its text encoder is OpenCLIP's, a function for each component: from
            PyTorch's name of a tensor to the original one, less the prefix.
        refused: Starts of names of other families' files, and the error's text for each.
    """

    prefixes: Mapping[str, str]
    open_clip: str
    renamers: Callable[[PipelineSpec, bool], dict[str, Callable[[str], str]]]
    refused: Mapping[str, str] = field(default_factory=dict)


def _nothing_to_check(_: PipelineSpec) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Family:
    """Pipelines whose denoiser is called in one way.

    Attributes:
        name: By which each backend finds its part of the family.
        title: What a user may give, for messages; None for the names of the pipelines.
        pipelines: By class name.
        same_parts: Other classes of pipelines, by the one of `pipelines` whose parts they have.
        prompt_arrays: Names of what the denoiser is told of a prompt, which the text encoders make of nothing else.
        lora_prefixes: Of the names of each component's layers in LoRA files of kohya's form.
        single_file: How a pipeline lies in one file; None where there are no such files.
        check: Raises ConfigError for parts that do not go together in training.
        check_drawing: Raises ConfigError for a pipeline that cannot be drawn from.
    """

    name: str
    title: str | None = None
    pipelines: Mapping[str, PipelineClass]
    same_parts: Mapping[str, str] = field(default_factory=dict)
    prompt_arrays: tuple[str, ...] = ()
    lora_prefixes: Mapping[str, str] = field(default_factory=dict)
    single_file: SingleFileLayout | None = None
    check: Callable[[PipelineSpec], None] = _nothing_to_check
    check_drawing: Callable[[PipelineSpec], None] = _nothing_to_check

    @property
    def models(self) -> dict[str, ModelClass]:
        """Its model classes by name."""
        return {model.name: model for pipeline in self.pipelines.values() for model in pipeline.parts.values()}

    def has(self, role: Role) -> bool:
        """Return whether its pipelines have a model of a role."""
        return any(model.role is role for model in self.models.values())


FAMILIES: Registry[Family] = Registry("family", ["flax_diffusion.core.families"], GROUP)
"""All families by name."""


def family_of(kind: str) -> Family:
    """Return the family that has a class of pipelines."""
    return next(family for family in FAMILIES.values() if kind in family.pipelines)


def model_class(name: str) -> ModelClass:
    """Return a model class by its PyTorch name."""
    return next(family.models[name] for family in FAMILIES.values() if name in family.models)


def subfolders() -> set[str]:
    """Return the names of all folders that a pipeline may hold."""
    pipelines = [pipeline for family in FAMILIES.values() for pipeline in family.pipelines.values()]
    return {name for pipeline in pipelines for name in (*pipeline.parts, *pipeline.tokenizers)} | {"scheduler"}
