"""The pipeline to train, as plain data: the configs of its models, its tokenizer and its noise scheduler.

Both backends build their modules from the same `PipelineSpec`. It is read and checked before any weight is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flax_diffusion.core.errors import WeightsError
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.family import FAMILIES, Family, ModelClass, Role, family_of, model_class
from flax_diffusion.core.io import model_files
from flax_diffusion.core.objectives.objective import OBJECTIVES, Objective, objective_of
from flax_diffusion.core.spec import weight_files
from flax_diffusion.core.spec.adapters import KohyaNames, Lora, NewTokens, Overlay
from flax_diffusion.core.typed import check_values

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from flax_diffusion.core.data.captions import TokenizePrompt


log = logging.getLogger(__name__)


class Training(StrEnum):
    """Which part of a model trains."""

    NOTHING = "nothing"
    ALL = "all"
    ADAPTERS = "adapters"  # LoRA or new tokens beside the model's own weights, which stay as they are


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model of a pipeline.

    Attributes:
        kind: Name of its PyTorch class.
        config: Its config.
        weights: Folder or Hub id of its weights; None to draw them at random.
        subfolder: Subfolder of `weights` that holds them.
        revision: Branch, tag or commit of a Hub id.
        variant: Variant of the weight files.
        training: Which part of it trains.
        lora: LoRA that trains; None for none.
        new_tokens: New tokens whose rows train, behind the embedding table; None for none.
        overlay: Differences from the weights in the files; None for none.
        copied_from: Model whose weights a new one starts with, by name; what that model lacks or has in another shape
            is drawn at random. None to draw all.
        rate_factor: Factor on the learning rate.
    """

    kind: str
    config: dict[str, Any]
    weights: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    training: Training = Training.NOTHING
    lora: Lora | None = None
    new_tokens: NewTokens | None = None
    overlay: Overlay | None = None
    copied_from: Component | None = None
    rate_factor: float = 1.0

    def __post_init__(self) -> None:
        if (self.training is Training.ADAPTERS) != (self.lora is not None or self.new_tokens is not None):
            raise ValueError(f"a component that trains {self.training} has lora {self.lora}, tokens {self.new_tokens}")
        check_values(self.model.schema, self.config, f"config of a {self.kind}")

    @property
    def model(self) -> ModelClass:
        """Class of the model."""
        return model_class(self.kind)

    @property
    def role(self) -> Role:
        """Role of the model in the pipeline."""
        return self.model.role

    @property
    def is_trained(self) -> bool:
        """Whether any part of it trains."""
        return self.training is not Training.NOTHING

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of the sample that a denoiser takes, and those that it predicts."""
        return self.model.channels(self)

    @property
    def fills_in(self) -> bool:
        """Whether a denoiser fills in pictures: it takes the sample, a mask, and what the mask leaves."""
        given, predicted = self.channels
        return given == 2 * predicted + 1

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key, getattr(self.model.schema, key, None))


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """Loss of an autoencoder.

    Attributes:
        rec_loss: Reconstruction loss: "l1" (absolute error) or "l2" (squared error).
        kl_scale: Weight of the divergence of the posterior from a normal distribution.
    """

    rec_loss: Literal["l1", "l2"]
    kl_scale: float

    def __post_init__(self) -> None:
        check_values(AutoencoderLoss, {"rec_loss": self.rec_loss}, "autoencoder")


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A pipeline to train or to draw from.

    Attributes:
        kind: Name of its Diffusers class.
        components: Its models, named as the subfolders of a Diffusers pipeline.
        scheduler: Config of its noise scheduler; empty for none.
        resolution: Height and width of the training images, in pixels.
        size: Height and width of the images to draw, in pixels; None where both are the resolution.
        tokenizers: Its tokenizers, named as the subfolders of a Diffusers pipeline.
        autoencoder_loss: Loss of an autoencoder; None where a denoiser is trained.
        objective_name: Objective of a run that does not train by that of its scheduler; None where it does.
        settings: Entries of model_index.json that are no parts, where they are others than the family's.
        classes: Names of the classes that its denoiser is told, by number; empty where it is told none.
        adapters_name: Name of the file that its trained adapters go to, without extension; None for the usual names.
        listed_as: Class that its model_index.json names where that is another one of the same parts; None for `kind`.
    """

    kind: str
    components: dict[str, Component]
    scheduler: dict[str, Any]
    resolution: int
    size: tuple[int, int] | None = None
    tokenizers: Mapping[str, CLIPTokenizer] = field(default_factory=dict)
    autoencoder_loss: AutoencoderLoss | None = None
    objective_name: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    adapters_name: str | None = None
    listed_as: str | None = None

    def __post_init__(self) -> None:
        if self.scheduler:
            self.objective.prediction(self.scheduler)

    @property
    def null_class(self) -> int | None:
        """Number of the class that stands for any, in the table's last row; None where there is none."""
        table = self.family.class_table
        rows = table.rows(self.denoiser) if table is not None and self.classes else None
        return len(self.classes) if rows == len(self.classes) + 1 else None

    @property
    def tokenize(self) -> TokenizePrompt | None:
        """The map from prompts to token ids, or None where the pipeline takes no prompts.

        The ids of `tokenizer` are `input_ids` in a batch, those of `tokenizer_2` are `input_ids_2`.
        """
        from flax_diffusion.core.data.captions import Tokenize, TokenizePrompt

        if not self.tokenizers or self.text_encoder is None:
            return None
        made = {name: Tokenize.from_clip(tokenizer) for name, tokenizer in self.tokenizers.items()}
        return TokenizePrompt({f"input_ids{name.removeprefix('tokenizer')}": own for name, own in made.items()})

    @property
    def encoder_tokenizers(self) -> dict[str, CLIPTokenizer]:
        """The tokenizers by the name of their text encoder."""
        encoders = self.family.pipelines[self.kind].tokenizers
        return {encoders[name]: tokenizer for name, tokenizer in self.tokenizers.items()}

    @property
    def kohya_names(self) -> KohyaNames:
        """Names of the layers in LoRA files of kohya's form."""
        return KohyaNames(self.family.lora_prefixes, self.family.lora_renamers(self), self.family.lora_refused)

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters train, and no whole model."""
        return any(component.training is Training.ADAPTERS for component in self.components.values())

    @property
    def family(self) -> Family:
        """Family of the pipeline."""
        return family_of(self.kind)

    def setting(self, name: str) -> Any:
        """Return an entry of model_index.json that is no part; None where such pipelines have none of that name."""
        return {**self.family.pipelines[self.kind].settings, **self.settings}.get(name)

    def names_of(self, role: Role) -> list[str]:
        """Return the names of the components that have a role."""
        return [name for name, part in self.components.items() if part.role is role]

    def _part(self, role: Role) -> Component | None:
        return next((self.components[name] for name in self.names_of(role)), None)

    @property
    def denoiser(self) -> Component:
        """The model that denoises."""
        return self.components[self.denoiser_name]

    @property
    def denoiser_name(self) -> str:
        """The denoiser's component name."""
        return self.names_of(Role.DENOISER)[0]

    @property
    def vae(self) -> Component | None:
        """The autoencoder, or None in pixel space."""
        return self._part(Role.AUTOENCODER)

    @property
    def vae_name(self) -> str:
        """The autoencoder's component name: `vae` in Stable Diffusion, `vqvae` in LDMPipeline."""
        return self.names_of(Role.AUTOENCODER)[0]

    @property
    def text_encoder(self) -> Component | None:
        """The text encoder, or None where the pipeline takes no prompts."""
        return self._part(Role.TEXT_ENCODER)

    @property
    def objective(self) -> type[Objective]:
        """Objective that the denoiser was or will be trained with."""
        return OBJECTIVES[self.objective_name] if self.objective_name else objective_of(self.scheduler)

    @property
    def prediction_type(self) -> str:
        """Prediction of the denoiser: epsilon, v_prediction, sample, flow_matching or edm."""
        return self.objective.prediction(self.scheduler)

    @property
    def image_channels(self) -> Literal[1, 3]:
        """Channels of the images that the pipeline makes."""
        channels: Any = self.vae["in_channels"] if self.vae else self.sample_shape[0]
        return channels

    @property
    def vae_factor(self) -> int:
        """Pixels per latent and side: 8 for Stable Diffusion, 1 in pixel space."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1) if self.vae else 1

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of what is denoised."""
        height, width = (side // self.vae_factor for side in self.size or (self.resolution, self.resolution))
        if self.vae:
            return (self.vae["latent_channels"], height, width)
        # A denoiser for inpainting takes more than it gives.
        return (min(self.denoiser.channels), height, width)

    @property
    def fills_in(self) -> bool:
        """Whether the denoiser fills in pictures."""
        return self.denoiser.fills_in

    @property
    def size_factor(self) -> int:
        """Number of which height and width of a picture are multiples: the VAE divides them, and then the denoiser."""
        denoiser = self._part(Role.DENOISER)
        return self.vae_factor * (denoiser.model.divides_by(denoiser) if denoiser else 1)


def open_pipeline(source: str, revision: str | None = None, variant: str | None = None) -> PipelineSpec:
    """Open a finished pipeline, to draw images from it or to convert it.

    Args:
        source: Folder or Hub id of the pipeline.
        revision: Branch, tag or commit of a Hub id.
        variant: Variant of the weight files.

    Returns:
        The pipeline.

    Raises:
        UserError: If it is no pipeline, or one of an unknown kind.
    """
    from flax_diffusion.core.data import captions as text

    drawing = [family for family in FAMILIES.values() if family.has(Role.DENOISER)]
    if not (index := folders.check_kind(source, revision, drawing)):
        raise WeightsError(f"{source} has no model_index.json: name a folder that holds a pipeline")
    kind, components, tokenizers = index["_class_name"], {}, {}
    pipeline = family_of(kind).pipelines[kind]
    for name, model in pipeline.parts.items():
        if folders.has_part(index, name):
            folder = model_files.resolve(source, name, revision, allow_patterns=["*.json"])
            components[name] = read_component(folder, model.name, source, name, revision, variant)
    scheduler = folders.read_scheduler(model_files.resolve(source, "scheduler", revision))
    for name in pipeline.tokenizers:
        if folders.has_part(index, name):
            tokenizers[name] = text.load_tokenizer(model_files.resolve(source, name, revision))
    denoiser = next((part for part in components.values() if part.role is Role.DENOISER), None)
    if denoiser is None or not isinstance(size := denoiser["sample_size"], int):
        raise WeightsError(f"{source}: has no UNet whose config says its sample_size as one number")
    check_variant(components.values(), variant)
    spec = PipelineSpec(
        kind=kind,
        components=components,
        scheduler=scheduler,
        resolution=1,
        tokenizers=tokenizers,
        settings=folders.settings(index),
        listed_as=folders.listed_as(index),
    )
    return replace(spec, resolution=size * spec.vae_factor, classes=folders.classes(index, spec.denoiser))


def check_variant(components: Collection[Component], variant: str | None) -> None:
    """Warn of models that lack the requested variant, so that their plain weight files are read.

    Args:
        components: The models.
        variant: The requested variant; None for none.

    Raises:
        WeightsError: If all of them lack it.
    """
    if variant is None:
        return
    lacking = [part for part in components if part.weights is not None and part.variant is None]
    if not any(part.variant for part in components):
        raise WeightsError(
            f"--variant {variant}: no weights of {lacking[0].weights} have it: drop it, or check the name"
        )
    for part in lacking:
        log.warning("%s: has no weights of variant %s; its others are read", part.subfolder or part.weights, variant)


def read_component(
    folder: Path,
    kind: str,
    source: str,
    subfolder: str | None,
    revision: str | None,
    variant: str | None,
    training: Training = Training.NOTHING,
) -> Component:
    """Read the config of one model of a pipeline.

    Args:
        folder: Local folder with its config.json.
        kind: Name of the PyTorch class that it must be of.
        source: Folder or Hub id of the weights.
        subfolder: Subfolder of `source`; None for a model by itself.
        revision: Branch, tag or commit of a Hub id.
        variant: Variant of the weight files; None for the plain ones.
        training: Which part of it is to train.

    Raises:
        WeightsError: If it is missing, or of another class.
    """
    values = model_files.read_json(folder / "config.json")
    architectures = values.get("architectures")
    listed = architectures[0] if isinstance(architectures, list) and architectures else kind
    found = str(values.get("_class_name") or listed)
    if variant is not None:
        names = model_files.file_names(source, subfolder, revision)
        variant = weight_files.variant_of(names, weight_files.base_name(kind), variant)
    if found.removeprefix("Flax") not in (kind, *model_class(kind).former_names):
        place = f"{source}/{subfolder}" if subfolder else source
        raise WeightsError(f"{place}: holds a {found}, must hold the {kind} that this task needs")
    return Component(
        kind=kind,
        config=folders.model_config(values),
        weights=source,
        subfolder=subfolder,
        revision=revision,
        variant=variant,
        training=training,
    )
