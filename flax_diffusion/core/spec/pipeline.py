"""What is trained, as plain data: the pipeline's models by their configs, its tokenizer and its noise scheduler.

Both backends build their modules from the same `PipelineSpec`. It is read and checked before any weight is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import FiniteFloat

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.families import kinds
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import write_json, written_folder
from flax_diffusion.core.objectives import noise_schedule, samplers
from flax_diffusion.core.spec import adapters, weight_files
from flax_diffusion.core.spec.adapters import Lora, NewTokens, Overlay
from flax_diffusion.core.typed import Count, Size, check_values

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from flax_diffusion.core.data.captions import Tokenize


log = logging.getLogger(__name__)


class _UNet2D:
    sample_size: Size | list[Size] | None = None
    in_channels: Size = 3
    out_channels: Size = 3
    block_out_channels: Sequence[Size] = (224, 448, 672, 896)
    down_block_types: Sequence[str] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    layers_per_block: Count | list[Count] = 2


class _UNet2DCondition(_UNet2D):
    in_channels: Size = 4
    out_channels: Size = 4
    block_out_channels: Sequence[Size] = (320, 640, 1280, 1280)
    down_block_types: Sequence[str] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    up_block_types: Sequence[str] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    cross_attention_dim: Size | list[Size] = 1280
    addition_embed_type: str | None = None


class _AutoencoderKL:
    in_channels: Size = 3
    latent_channels: Size = 4
    block_out_channels: Sequence[Size] = (64,)
    layers_per_block: Count = 1
    scaling_factor: FiniteFloat = 0.18215


class _CLIPText:
    hidden_size: Size = 512
    num_hidden_layers: Count = 12
    max_position_embeddings: Size = 77
    hidden_act: str = "quick_gelu"


_KNOWN: dict[str, type] = {
    "UNet2DModel": _UNet2D,
    "UNet2DConditionModel": _UNet2DCondition,
    "AutoencoderKL": _AutoencoderKL,
    "CLIPTextModel": _CLIPText,
}
"""The keys of configs that are read before there are models, with the defaults of Diffusers and Transformers."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model: its PyTorch class, its config, where its weights are (None: drawn at random), what of it trains."""

    kind: str
    config: dict[str, Any]
    weights: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    train: bool = False  # all of it
    lora: Lora | None = None  # these beside it
    new_tokens: NewTokens | None = None  # their rows behind its embedding table
    overlay: Overlay | None = None  # what differs from the weights

    def __post_init__(self) -> None:
        check_values(_KNOWN[self.kind], self.config, f"config of a {self.kind}")

    @property
    def adapted(self) -> bool:
        """Whether something beside the model's own weights trains, and those do not."""
        return self.lora is not None or self.new_tokens is not None

    @property
    def trains(self) -> bool:
        """Whether anything of it trains."""
        return self.train or self.adapted

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key, getattr(_KNOWN[self.kind], key, None))


@dataclass(frozen=True, kw_only=True)
class AutoencoderLoss:
    """How an autoencoder is trained."""

    rec_loss: Literal["l1", "l2"]
    kl_scale: float

    def __post_init__(self) -> None:
        check_values(AutoencoderLoss, {"rec_loss": self.rec_loss}, "autoencoder")


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A pipeline to train. `components` are named as the subfolders of a Diffusers pipeline."""

    kind: str
    components: dict[str, Component]
    scheduler: dict[str, Any]
    resolution: int
    alphas_cumprod: np.ndarray = field(repr=False)
    size: tuple[int, int] | None = None  # height and width of what is drawn; None: both are the resolution
    tokenizer: CLIPTokenizer | None = None
    autoencoder_loss: AutoencoderLoss | None = None  # None: a denoiser is trained

    def __post_init__(self) -> None:
        if self.scheduler:
            samplers.prediction_type(self.scheduler)

    @property
    def tokenize(self) -> Tokenize | None:
        """From prompts to token ids, or None when there are no prompts."""
        from flax_diffusion.core.data.captions import Tokenize

        if self.tokenizer is None or self.text_encoder is None:
            return None
        return Tokenize.from_clip(self.tokenizer)

    @property
    def adapted(self) -> bool:
        """Whether adapters train, and no whole model."""
        return any(component.adapted for component in self.components.values())

    @property
    def unet(self) -> Component:
        """The denoiser."""
        return self.components["unet"]

    @property
    def vae(self) -> Component | None:
        """The autoencoder, or None in pixel space."""
        return self.components.get(self.vae_name)

    @property
    def vae_name(self) -> str:
        """The autoencoder's component name: `vae` in Stable Diffusion, `vqvae` in LDMPipeline."""
        return "vqvae" if "vqvae" in self.components else "vae"

    @property
    def text_encoder(self) -> Component | None:
        """The text encoder, or None when there are no captions."""
        return self.components.get("text_encoder")

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon, v_prediction or sample."""
        return samplers.prediction_type(self.scheduler)

    @property
    def image_channels(self) -> Literal[1, 3]:
        """Channels of the images that the pipeline makes."""
        return (self.vae or self.unet)["in_channels"]

    @property
    def vae_factor(self) -> int:
        """Pixels a latent: 8 for Stable Diffusion, 1 in pixel space."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1) if self.vae else 1

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of what is denoised."""
        height, width = (side // self.vae_factor for side in self.size or (self.resolution, self.resolution))
        return (self.vae["latent_channels"] if self.vae else self.unet["in_channels"], height, width)

    @property
    def size_factor(self) -> int:
        """What height and width of a picture are multiples of: the VAE halves them, and then the UNet."""
        return self.vae_factor * 2 ** (len(self.unet["down_block_types"]) - 1)


def open_pipeline(source: str, revision: str | None = None, variant: str | None = None) -> PipelineSpec:
    """Reads a finished pipeline, to draw images from.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        variant: Variant of the weight files.

    Raises:
        UserError: If it is not a pipeline, or one of a kind that is not known here.
    """
    from flax_diffusion.core.data import captions as text

    index = kinds.check_kind(source, revision, kinds.PARTS)
    if not index:
        raise WeightsError(f"{source} has no model_index.json: name a folder that holds a pipeline")
    kind = index["_class_name"]
    components = {}
    for name, model in kinds.PARTS[kind].items():
        if kinds.has_part(index, name):
            folder = model_files.resolve(source, name, revision, allow_patterns=["*.json"])
            components[name] = read_component(folder, model, source, name, revision, variant)
    scheduler = model_files.read_json(model_files.resolve(source, "scheduler", revision) / "scheduler_config.json")
    tokenizer = (
        text.load_tokenizer(model_files.resolve(source, "tokenizer", revision)) if "tokenizer" in index else None
    )
    if "unet" not in components or not isinstance(size := components["unet"]["sample_size"], int):
        raise WeightsError(f"{source}: has no UNet whose config says its sample_size as one number")
    check_variant(components.values(), variant)
    unet = components["unet"]
    if kind in kinds.TEXT_KINDS and unet["in_channels"] != unet["out_channels"]:
        raise WeightsError(
            f"{source}: its UNet has in_channels {unet['in_channels']} and out_channels {unet['out_channels']}; "
            "inpainting models are not drawn from yet: use one that has both equal"
        )
    spec = PipelineSpec(
        kind=kind,
        components=components,
        scheduler=scheduler,
        resolution=1,
        alphas_cumprod=noise_schedule.alphas_cumprod_from_config(samplers.noise_config(scheduler)),
        tokenizer=tokenizer,
    )
    return replace(spec, resolution=size * spec.vae_factor)


def check_variant(components: Collection[Component], variant: str | None) -> None:
    """Says which parts of a pipeline lack the variant that was asked for, and are read without.

    Raises:
        WeightsError: If all do.
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
    *,
    train: bool = False,
) -> Component:
    """Reads the config of one model of a pipeline.

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
    if found.removeprefix("Flax") != kind:
        place = f"{source}/{subfolder}" if subfolder else source
        raise WeightsError(f"{place}: holds a {found}, must hold the {kind} that this task needs")
    return Component(
        kind=kind,
        config=kinds.model_config(values),
        weights=source,
        subfolder=subfolder,
        revision=revision,
        variant=variant,
        train=train,
    )


def check_prompts(spec: PipelineSpec, prompts: list[str]) -> None:
    """Raises ConfigError unless there are prompts exactly where the pipeline takes them."""
    if (spec.tokenizer is not None) != bool(prompts):
        fix = "drop --prompt" if prompts else "give at least one --prompt"
        raise ConfigError(f"a {spec.kind} with {len(prompts)} prompts: {fix}")


def write_index(spec: PipelineSpec, folder: Path) -> None:
    """Writes what a pipeline folder holds beside its models: model_index.json, scheduler and tokenizer."""
    library = {"CLIPTextModel": "transformers"}
    index: dict[str, Any] = {"_class_name": spec.kind}
    for name, component in spec.components.items():
        index[name] = [library.get(component.kind, "diffusers"), component.kind]
    index["scheduler"] = ["diffusers", spec.scheduler["_class_name"].removeprefix("Flax")]
    if spec.tokenizer is not None:
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
        index.setdefault("vae", [None, None])
        index["requires_safety_checker"] = False
        save_tokenizer(spec, folder)
    scheduler = spec.scheduler | {"_class_name": index["scheduler"][1]}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def save_tokenizer(spec: PipelineSpec, folder: Path) -> None:
    """Writes the tokenizer, if there is one; a resumed run reads it from there."""
    if spec.tokenizer is not None:
        with written_folder(folder / "tokenizer") as local:
            spec.tokenizer.save_pretrained(local)


def write_adapters(spec: PipelineSpec, trained: Mapping[str, np.ndarray], folder: Path, form: str) -> None:
    """Writes trained adapters: pytorch_lora_weights.safetensors, or learned_embeds.safetensors.

    Args:
        spec: Says what was trained.
        trained: Arrays by component and PyTorch name: `unet/….lora_A.weight`.
        folder: To write to.
        form: Of LoRA: "peft" or "kohya".
    """
    loras = {}
    for name, component in spec.components.items():
        own = {key.removeprefix(f"{name}/"): array for key, array in trained.items() if key.startswith(f"{name}/")}
        own = {key: np.asarray(array, np.float32) for key, array in own.items()}
        if component.lora is not None:
            loras[name] = adapters.trained_layers(component.lora, own)
        if component.new_tokens is not None:
            adapters.save_embeddings(folder / adapters.EMBEDDINGS_FILE, component.new_tokens, own[adapters.NEW_ROWS])
    if loras:
        adapters.save_lora(folder / adapters.LORA_FILE, loras, form)
