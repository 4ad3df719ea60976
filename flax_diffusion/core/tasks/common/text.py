"""Common parts of the tasks whose images follow a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import CONFIG_FILE, Reads, also
from flax_diffusion.core.data import captions
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError, DataError, UserError, WeightsError, naming
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.family import FAMILIES, ModelClass, Role, family_of
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import as_path, local_copy
from flax_diffusion.core.spec import writing
from flax_diffusion.core.spec.adapters import Lora
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training
from flax_diffusion.core.tasks.common.lora_header import lora_header
from flax_diffusion.core.tasks.common.previews import PREVIEWED, PreviewedConfig, PreviewedTask
from flax_diffusion.core.tasks.parts import check_part, check_pipeline, frozen_vae, pretrained

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

NEW_PIPELINE = "StableDiffusionPipeline"
"""Pipeline of a model from scratch where no option says so, and of a folder that does not say what it is."""

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Layers that LoRA adapts by default, as in Diffusers' scripts."""


@with_defaults(resolution=512, eval_batch_size=4)
class TextConfig(PreviewedConfig):
    """Options of tasks whose images follow a text."""

    vae: Annotated[str | None, Reads.MODEL] = Field(
        "pretrained",
        validation_alias=also("vae", "pretrained_vae_model_name_or_path"),
        description="Folder or Hub id of an AutoencoderKL. `pretrained`: that of the pipeline. None: train on pixels.",
    )
    tokenizer_name: Annotated[str | None, Reads.MODEL] = Field(
        None, description="Folder or Hub id of a CLIP tokenizer. None: the pipeline's, or one made from the captions."
    )


def _file_name(name: str | None) -> str | None:
    if name is not None and (name != Path(name).name or name.endswith(".safetensors") or name.split() != [name]):
        raise ValueError(f"'{name}': must be a name without folder, spaces and .safetensors, such as my_dog")
    return name


OutputName = Annotated[
    str | None,
    AfterValidator(_file_name),
    Field(
        description="Name of the file that the adapters go to, without .safetensors. None: the name that Diffusers "
        "looks for, pytorch_lora_weights or learned_embeds."
    ),
]
"""Option that names the file of adapters."""


class PromptsConfig(TextConfig):
    """Options of tasks whose prompts are known before training."""

    pre_compute_text_embeddings: bool = Field(
        False, description="Encode each prompt once, before training. The text encoder is then freed, and cannot train."
    )
    precomputed_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Dtype of these embeddings in files. bfloat16 takes half the space, and rounds them."
    )

    @model_validator(mode="after")
    def _check_dtype(self) -> PromptsConfig:
        if self.precomputed_dtype != "float32" and not self.pre_compute_text_embeddings:
            raise ValueError(
                f"--precomputed_dtype {self.precomputed_dtype} is of text embeddings that are computed once: add "
                "--pre_compute_text_embeddings, or drop it"
            )
        return self


class CaptionedConfig(PromptsConfig):
    """Options of tasks whose prompts are known before training, and whose text encoder may train."""

    train_text_encoder: bool = Field(False, description="Train the text encoder too.")

    @model_validator(mode="after")
    def _check_embeddings(self) -> CaptionedConfig:
        if self.pre_compute_text_embeddings and self.train_text_encoder:
            raise ValueError(
                "--pre_compute_text_embeddings encodes each prompt once, and --train_text_encoder changes what comes "
                "of it: drop one"
            )
        return self


class LoraConfig(CaptionedConfig):
    """Options of tasks that can train LoRA instead of the whole model."""

    text_encoder_learning_rate: float | None = Field(
        None,
        gt=0,
        validation_alias=also("text_encoder_learning_rate", "text_encoder_lr"),
        description="Peak learning rate of the text encoder. None: that of the UNet.",
    )
    lora_rank: int | None = Field(
        None, ge=1, validation_alias=also("lora_rank", "rank"), description="Train LoRA of this rank, not the model."
    )
    lora_alpha: float | None = Field(None, gt=0, description="LoRA's alpha; its scale is alpha / rank. None: the rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Probability with which LoRA drops an input.")
    lora_target_modules: list[str] = Field(list(UNET_TARGETS), description="Layers of the UNet to adapt.")
    lora_text_encoder_target_modules: list[str] = Field(
        list(TEXT_ENCODER_TARGETS), description="Layers of the text encoder to adapt, with --train_text_encoder."
    )
    lora_format: Literal["peft", "kohya"] = Field("peft", description="Names in pytorch_lora_weights.safetensors.")
    output_name: OutputName = None

    @model_validator(mode="after")
    def _check_lora(self) -> LoraConfig:
        if self.lora_rank is None:
            names = ("alpha", "dropout", "target_modules", "text_encoder_target_modules", "format")
            for name in (*(f"lora_{name}" for name in names), "output_name"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"--{name} goes with --lora_rank: add it, 4 is usual, or drop the former")
        elif self.pretrained_model_name_or_path is None:
            raise ValueError("--lora_rank adapts a model: give --pretrained_model_name_or_path")
        if self.text_encoder_learning_rate is not None and not self.train_text_encoder:
            raise ValueError("--text_encoder_learning_rate goes with --train_text_encoder: add it, or drop the former")
        return self


T = TypeVar("T", bound=TextConfig, covariant=True)
L = TypeVar("L", bound=LoraConfig, covariant=True)


class TextTask(PreviewedTask[T]):
    """Training of Stable Diffusion 1.x or 2.x, or of parts of it."""

    roles: ClassVar[frozenset[Role]] = frozenset({Role.TEXT_ENCODER, Role.DENOISER, Role.AUTOENCODER})
    """Roles of the models that the task has a use for."""
    lora_format: Literal["peft", "kohya"] = "peft"
    adapters_name: str | None = None
    """Name of the file of adapters, without extension; None for the usual one."""

    def __init__(self, config: T):
        super().__init__(with_resolution(config))

    def make_spec(self, source: Source) -> PipelineSpec:
        """Read the configs of the pipeline to train; the captions make tokenizers where there are none."""
        config = self.config
        made_before = as_path(config.output_dir) if config.resume_from_checkpoint else None
        return self.checked(self.read_pipeline(lambda: captions_of(source), made_before))

    def reopen_spec(self, run: Path) -> PipelineSpec:
        """Return the pipeline that a run trains, with the tokenizers that it made, if it did."""
        config = self.config
        if not (config.pretrained_model_name_or_path or config.tokenizer_name) and not (run / "tokenizer").is_dir():
            raise WeightsError(f"{run}: has no folder tokenizer, without which nobody knows its words: bring it back")
        try:
            return self.read_pipeline(list, run)
        except WeightsError as error:
            raise WeightsError(f"{run / CONFIG_FILE} names what is not there any more: {error}") from error

    def read_pipeline(self, texts: Callable[[], Iterable[str]], made_before: Path | None) -> PipelineSpec:
        """Read the configs of the pipeline, and its tokenizers.

        Args:
            texts: Returns every caption; called only when a tokenizer must be made.
            made_before: Folder of a run that is resumed, which has the tokenizers that it made, if it did.
        """
        config = self.config
        families = [family for family in FAMILIES.values() if family.has(Role.TEXT_ENCODER)]
        index = check_pipeline(config, families) if config.pretrained_model_name_or_path else {}
        kind = self.kind_of(index.get("_class_name", self.new_pipeline))
        pipeline = family_of(kind).pipelines[kind]
        models = pipeline.parts
        vain = [name for name, model in models.items() if model.role not in self.roles]
        if vain:
            raise WeightsError(
                f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}: is a {kind}, whose {vain[0]} "
                f"this task has no use for: name the pipeline that it was made from, or use the task {vain[0]}"
            )
        components = self.read_models(models)
        if config.tokenizer_name and len(pipeline.tokenizers) > 1:
            raise ConfigError(
                f"--tokenizer_name names one tokenizer, and a {kind} has {len(pipeline.tokenizers)}: drop it"
            )
        tokenizers = {
            name: self._tokenizer(name, components[encoder], texts, made_before)
            for name, encoder in pipeline.tokenizers.items()
        }
        by_encoder = {encoder: tokenizers[name] for name, encoder in pipeline.tokenizers.items()}
        if not config.pretrained_model_name_or_path:
            for encoder, tokenizer in by_encoder.items():
                ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
                known = components[encoder].config | ids | {"vocab_size": len(tokenizer)}
                components[encoder] = replace(components[encoder], config=known)
        components = {name: self.adapted(part, by_encoder.get(name)) for name, part in components.items()}
        vae = next(name for name, model in models.items() if model.role is Role.AUTOENCODER)
        # A pipeline that was trained on pixels has no VAE.
        if config.vae == "pretrained" and (not index or folders.has_part(index, vae)):
            components[vae] = pretrained(config, vae, models[vae], train=False)
        elif config.vae and config.vae != "pretrained":
            components[vae] = frozen_vae(config.vae)
        spec = self.pipeline(kind, components, tokenizers)
        # A new model is trained on empty prompts, and guided away from them as they are.
        new = dict.fromkeys(pipeline.settings.keys() & {"force_zeros_for_empty_prompt"}, False)
        return replace(spec, settings=folders.settings(index) if index else new, adapters_name=self.adapters_name)

    @property
    def new_pipeline(self) -> str:
        """Class of a pipeline from scratch, and of a folder that does not say what it is."""
        return NEW_PIPELINE

    def kind_of(self, found: str) -> str:
        """Return the class of the pipeline to train, for that of the pretrained one or of a new one."""
        return found

    def read_models(self, models: Mapping[str, ModelClass]) -> dict[str, Component]:
        """Read the configs of the text encoders and the denoiser.

        Args:
            models: Classes of all models of the pipeline, by component.
        """
        return {
            name: pretrained(self.config, name, model, train=model.role is Role.DENOISER)
            for name, model in models.items()
            if model.role is not Role.AUTOENCODER
        }

    def adapted(self, part: Component, tokenizer: CLIPTokenizer | None) -> Component:
        """Return a text encoder or the denoiser with what trains beside its weights, if anything does.

        Args:
            part: The model.
            tokenizer: A text encoder's tokenizer; None for the denoiser.
        """
        return part

    def _tokenizer(
        self, name: str, encoder: Component, texts: Callable[[], Iterable[str]], made_before: Path | None
    ) -> CLIPTokenizer:
        config, source = self.config, self.config.pretrained_model_name_or_path
        if config.tokenizer_name:
            check_part(config.tokenizer_name, "--tokenizer_name", "tokenizer")
            with naming("--tokenizer_name"):
                folder = model_files.resolve(config.tokenizer_name, allow_patterns=["*.json", "*.txt"])
                return captions.load_tokenizer(folder)
        if source:
            return captions.load_tokenizer(model_files.resolve(source, name, config.revision))
        if made_before is not None and (made_before / name).is_dir():
            return captions.load_tokenizer(local_copy(made_before / name))
        size = encoder.config.get("vocab_size", 4096)
        return captions.train_tokenizer(texts(), size, encoder["max_position_embeddings"])

    def trained_prompts(self, source: Source) -> list[str]:
        """Return some prompts that the run trains on: the captions of the first examples.

        Args:
            source: The examples.
        """
        return list(dict.fromkeys(islice(captions_of(source), PREVIEWED)))

    def first_examples(self, spec: PipelineSpec, source: Source) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield the examples of the first epoch in their order in the data, each with its index.

        Those that cannot be read are left out: the loader reports them, or skips them.
        """
        make = self.make_example_fn(spec)
        for index in range(len(source)):
            try:
                yield index, make(source, self.config.seed, 0, index)
            except DataError:
                continue

    def export_trained(
        self, backend: Backend, spec: PipelineSpec, source: Source, folder: Path, *, only_trained: bool = False
    ) -> None:
        """Write the models, or the adapters where these train."""
        if not spec.trains_adapters:
            super().export_trained(backend, spec, source, folder, only_trained=only_trained)
            return
        arrays = backend.trained_arrays()
        if backend.process_index == 0:
            lora = any(component.lora for component in spec.components.values())
            header = lora_header(self.config, spec, len(source), self.lora_format) if lora else {}
            writing.write_adapters(spec, arrays, folder, self.lora_format, header)

    def export(self, backend: Backend, spec: PipelineSpec, source: Source, folder: Path) -> None:
        """Write a pipeline that Diffusers loads, or the adapters."""
        if spec.trains_adapters:
            self.export_trained(backend, spec, source, folder)
        else:
            super().export(backend, spec, source, folder)


def variant_of(kind: str, what: Literal["inpainting", "control"], option: str) -> str:
    """Return the class of pipelines of the same family that fill in pictures, or that have a ControlNet.

    Args:
        kind: Class of a pipeline.
        what: Name of the variant, of the family's attribute.
        option: What asks for it, for messages.

    Raises:
        ConfigError: If the family has none.
    """
    found = getattr(family_of(kind), what)
    if found is None:
        raise ConfigError(f"{option}: there is none of a {kind}; use another pipeline")
    return found


def with_resolution(config: T) -> T:
    """Return a run's options with the resolution of the pipeline's family, where it has one and none is given."""
    source = config.pretrained_model_name_or_path
    if source is None or "resolution" in config.model_fields_set:
        return config
    try:
        kind = folders.read_index(source, config.revision).get("_class_name")
    except UserError:  # make_spec reads it again, and says what is wrong
        return config
    resolution = next((family.resolution for family in FAMILIES.values() if kind in family.pipelines), None)
    return config if resolution is None else config.model_copy(update={"resolution": resolution})


def captions_of(source: Source) -> Iterator[str]:
    """Yield the captions that can be read; `check_source` and the loader report the others."""
    for index in range(len(source)):
        try:
            caption = source[index].caption
        except DataError:
            continue
        yield from [caption] if isinstance(caption, str) else caption or []


class LoraTask(TextTask[L]):
    """Training of the whole UNet or of LoRA, and of the text encoder if requested."""

    def __init__(self, config: L):
        super().__init__(config)
        self.lora_format, self.adapters_name = config.lora_format, config.output_name
        self.embeds_prompts = config.pre_compute_text_embeddings
        self.precomputed_dtype = config.precomputed_dtype

    def read_models(self, models: Mapping[str, ModelClass]) -> dict[str, Component]:
        """Read the configs of the text encoders, which may train too, and the denoiser."""
        training = Training.ALL if self.config.train_text_encoder else Training.NOTHING
        parts = super().read_models(models)
        return {
            name: replace(part, training=training) if part.role is Role.TEXT_ENCODER else part
            for name, part in parts.items()
        }

    def adapted(self, part: Component, tokenizer: CLIPTokenizer | None) -> Component:
        """Return a model with its own learning rate, and with LoRA beside its weights, if there is any."""
        config, targets = self.config, self.config.lora_target_modules
        if part.role is Role.TEXT_ENCODER:
            targets = config.lora_text_encoder_target_modules
            if config.text_encoder_learning_rate is not None:
                part = replace(part, rate_factor=config.text_encoder_learning_rate / config.learning_rate)
        if config.lora_rank is None or not part.is_trained:
            return part
        return replace(part, training=Training.ADAPTERS, lora=self._lora(targets))

    def _lora(self, targets: list[str]) -> Lora:
        rank = int(self.config.lora_rank or 0)
        alpha = self.config.lora_alpha or float(rank)
        return Lora(rank=rank, alpha=alpha, dropout=self.config.lora_dropout, targets=tuple(targets))
