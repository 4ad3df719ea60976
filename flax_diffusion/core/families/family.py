"""What a family of models is: its pipelines, the models in them, and their names on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flax_diffusion.core.registry import Registry

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import Component, PipelineSpec

GROUP = "flax_diffusion.core"


NOTHING = [None, None]
"""How model_index.json says that a part is not there."""


class Role(StrEnum):
    """What a model does in a pipeline."""

    DENOISER = "denoiser"
    AUTOENCODER = "autoencoder"
    TEXT_ENCODER = "text encoder"
    CONTROL = "control network"


def _own_channels(component: Component) -> tuple[int, int]:
    return component["in_channels"], component["out_channels"]


def _halvings(component: Component) -> int:
    return 2 ** (len(component["down_block_types"]) - 1)


@dataclass(frozen=True, kw_only=True)
class ModelClass:
    """A class of models.

    Attributes:
        name: Of the PyTorch class, which a config.json names.
        role: What such a model does in a pipeline.
        library: That has the PyTorch class.
        schema: A class whose annotations are the config keys that are read before there is a model, and whose
            attributes are their defaults, as in the library.
        noun: What it is called in messages.
        former_names: Names that the class had in older files.
        former_keys: Config keys of such files that a model of this class has not.
        channels: Returns, of a denoiser, the channels of the sample that it takes, and those that it predicts.
        divides_by: Returns, of a denoiser, the number of which height and width of the sample are multiples.
        sizes: Configs that have names in the literature.
    """

    name: str
    role: Role
    library: Literal["diffusers", "transformers"] = "diffusers"
    schema: type
    noun: str = "UNet"
    former_names: tuple[str, ...] = ()
    former_keys: Collection[str] = ()
    channels: Callable[[Component], tuple[int, int]] = _own_channels
    divides_by: Callable[[Component], int] = _halvings
    sizes: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PipelineClass:
    """A class of pipelines, as model_index.json names it.

    Attributes:
        parts: Model classes by component, which is also the name of its subfolder.
        tokenizers: Text encoders by the name of their tokenizer's subfolder.
        scheduler: Keys of the scheduler's config where it is ours to choose.
        index: Entries of model_index.json beside the parts that are there.
        settings: Further entries, which are no parts and which a pipeline may have otherwise.
    """

    parts: Mapping[str, ModelClass]
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SingleFileLayout:
    """How a whole pipeline lies in one file of the original code.

    Attributes:
        prefixes: Of the names of each component's tensors.
        open_clip: Start of the names by which a text encoder is OpenCLIP's, by those that may be.
        renamers: Makes, of a pipeline and the text encoders that are OpenCLIP's, a function for each component: from
            PyTorch's name of a tensor to the original one, less the prefix.
        refused: Starts of names in files of other models, and the error's text for each.
    """

    prefixes: Mapping[str, str]
    open_clip: Mapping[str, str]
    renamers: Callable[[PipelineSpec, Collection[str]], dict[str, Callable[[str], str]]]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """The table of a denoiser that is told the class of a picture, a row for each class.

    Attributes:
        key: Config key of the number of rows, or of the number of classes.
        counts_null: Whether that number counts the row of the null class, which the table then need not have;
            otherwise the table always has it, as its last row.
    """

    key: str
    counts_null: bool

    def rows(self, denoiser: Component) -> int | None:
        """Return the number of rows of a denoiser's table, with that of the null class; None where it has none."""
        number = denoiser[self.key]
        return number if number is None or self.counts_null else number + 1

    def number(self, classes: int, *, null: bool) -> int:
        """Return the config's number for a number of classes, with or without a null class."""
        return classes + (1 if null and self.counts_null else 0)


def _nothing_to_check(_: Any) -> None:
    pass


class LoraBase(NamedTuple):
    """What a LoRA file calls the model that it adapts.

    Attributes:
        architecture: By https://github.com/Stability-AI/ModelSpec.
        version: By kohya's sd-scripts.
        original: The code whose names a file of kohya's form has.
    """

    architecture: str
    version: str
    original: str


def _no_lora_base(spec: PipelineSpec) -> LoraBase:
    raise AssertionError(f"LoRA does not adapt a {spec.kind}")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Pipelines whose denoiser is called in one way.

    Attributes:
        name: By which each backend finds its part of the family.
        title: What a user may give, for messages; None for the names of the pipelines.
        pipelines: By class name.
        same_parts: Other classes of pipelines, by the one of `pipelines` whose parts they have.
        inpainting: Class of its pipelines that fill in pictures; None for none.
        control: Class of its pipelines with a ControlNet; None for none.
        resolution: Height and width of the pictures that its published models were trained on, in pixels; None where
            they differ.
        told_sizes: Whether the denoiser is told each picture's size and the corner where it was cut.
        class_table: The denoiser's table of classes; None where no denoiser has one.
        prompt_arrays: Names of what the denoiser is told of a prompt, which the text encoders make of nothing else.
        word_keys: Names of a new word's rows in the files of textual inversion, by text encoder; empty where the rows
            have the word for a name.
        lora_prefixes: Of the names of each component's layers in LoRA files of kohya's form.
        lora_renamers: Makes, of a pipeline, functions from PyTorch's name of a parameter to the original one, by
            component whose layers have the latter in such files.
        lora_refused: Starts of names in LoRA files of other families, and the error's text for each.
        lora_base: Returns what a LoRA file calls a pipeline that it adapts.
        single_file: How a pipeline lies in one file; None where there are no such files.
        check_index: Raises WeightsError for a model_index.json of a pipeline that has not all parts.
        check: Raises ConfigError for parts that do not go together in training.
        check_drawing: Raises ConfigError for a pipeline that cannot be drawn from.
        card: Returns the part of a pipeline's model card that says how to draw, where plain Diffusers needs more than
            one call to draw from it; else None.
    """

    name: str
    title: str | None = None
    pipelines: Mapping[str, PipelineClass]
    same_parts: Mapping[str, str] = field(default_factory=dict)
    inpainting: str | None = None
    control: str | None = None
    resolution: int | None = None
    told_sizes: bool = False
    class_table: ClassTable | None = None
    prompt_arrays: tuple[str, ...] = ()
    word_keys: Mapping[str, str] = field(default_factory=dict)
    lora_prefixes: Mapping[str, str] = field(default_factory=dict)
    lora_renamers: Callable[[PipelineSpec], dict[str, Callable[[str], str]]] = lambda _: {}
    lora_refused: Mapping[str, str] = field(default_factory=dict)
    lora_base: Callable[[PipelineSpec], LoraBase] = _no_lora_base
    single_file: SingleFileLayout | None = None
    check_index: Callable[[Mapping[str, Any]], None] = _nothing_to_check
    check: Callable[[PipelineSpec], None] = _nothing_to_check
    check_drawing: Callable[[PipelineSpec], None] = _nothing_to_check
    card: Callable[[PipelineSpec], str | None] = lambda _: None

    @property
    def models(self) -> dict[str, ModelClass]:
        """Its model classes by name."""
        return {model.name: model for pipeline in self.pipelines.values() for model in pipeline.parts.values()}

    @property
    def new_pipelines(self) -> dict[str, PipelineClass]:
        """Its pipelines that can be made from scratch, by class name."""
        return {name: own for name, own in self.pipelines.items() if name not in (self.inpainting, self.control)}

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
