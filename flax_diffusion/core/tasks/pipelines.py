"""The pipeline that each task trains, from its options: read and checked before any weight is touched."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from flax_diffusion.core.config.options import DiffusionConfig, LoraConfig, TextConfig, TrainConfig
from flax_diffusion.core.errors import ConfigError, WeightsError, naming, nearest_multiples
from flax_diffusion.core.families import kinds
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import local_copy
from flax_diffusion.core.objectives import noise_schedule, samplers
from flax_diffusion.core.objectives.ddpm import ddpm
from flax_diffusion.core.objectives.objective import Objective
from flax_diffusion.core.spec.adapters import Lora, NewTokens
from flax_diffusion.core.spec.new_words import add_word
from flax_diffusion.core.spec.pipeline import AutoencoderLoss, Component, PipelineSpec, check_variant, read_component
from flax_diffusion.core.tasks.autoencoder import AutoencoderConfig
from flax_diffusion.core.tasks.text_to_image import TextToImageConfig
from flax_diffusion.core.tasks.textual_inversion import TextualInversionConfig

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)

TUTORIAL_UNET: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
"""The UNet of Diffusers' unconditional tutorial and script, used when none is named."""


def autoencoder(config: AutoencoderConfig) -> PipelineSpec:
    """The lone AutoencoderKL that `train autoencoder` trains."""
    if config.pretrained_model_name_or_path:
        vae = _pretrained(config, _autoencoder_part(config), "AutoencoderKL", train=True)
    else:
        assert config.vae is not None
        vae = Component(kind="AutoencoderKL", config=_read_config(config.vae, "--vae"), train=True)
    check_variant([vae], config.variant)
    vae = _sized(vae, config.resolution)
    spec = PipelineSpec(
        kind="AutoencoderKL",
        components={"vae": vae},
        scheduler={},
        resolution=config.resolution,
        alphas_cumprod=np.empty(0),
        autoencoder_loss=AutoencoderLoss(rec_loss=config.rec_loss, kl_scale=config.kl_scale),
    )
    _check_resolution(config.resolution, spec.vae_factor)
    _check_channels(spec)
    return spec


def unconditional(config: DiffusionConfig) -> PipelineSpec:
    """The pipeline that `train unconditional` trains: a UNet2DModel, in pixel or latent space."""
    if config.pretrained_model_name_or_path:
        _check_kind(config, kinds.UNCONDITIONAL_KINDS)
        unet = _pretrained(config, "unet", "UNet2DModel", train=True)
    else:
        given = TUTORIAL_UNET if config.unet is None else _read_config(config.unet, "--unet")
        unet = Component(kind="UNet2DModel", config=given, train=True)
    components = {"unet": unet}
    if config.vae:
        components["vqvae"] = _vae(config.vae)
    kind = "LDMPipeline" if config.vae else "DDPMPipeline"
    return _checked(kind, components, config)


def text_to_image(config: TextConfig, captions: Iterable[str], made_before: Path | None) -> PipelineSpec:
    """The pipeline of every task with prompts: Stable Diffusion 1.x or 2.x, or one from scratch.

    Args:
        config: The run's options.
        captions: Every caption; read only when a tokenizer must be made.
        made_before: Where a run that is resumed keeps the tokenizer that it made, if it did.
    """
    from flax_diffusion.core.data import captions as text

    pretrained = config.pretrained_model_name_or_path
    trains_encoder = isinstance(config, LoraConfig) and config.train_text_encoder
    index = _check_kind(config, kinds.TEXT_KINDS) if pretrained else {}
    if pretrained:
        encoder = _pretrained(config, "text_encoder", "CLIPTextModel", train=trains_encoder)
        unet = _pretrained(config, "unet", "UNet2DConditionModel", train=True)
    else:
        assert isinstance(config, TextToImageConfig)
        assert config.text_encoder is not None
        assert config.unet is not None
        encoder = Component(
            kind="CLIPTextModel", config=_read_config(config.text_encoder, "--text_encoder"), train=True
        )
        unet = Component(kind="UNet2DConditionModel", config=_read_config(config.unet, "--unet"), train=True)

    if config.tokenizer_name:
        _check_part(config.tokenizer_name, "--tokenizer_name", "tokenizer")
        with naming("--tokenizer_name"):
            tokenizer = text.load_tokenizer(
                model_files.resolve(config.tokenizer_name, allow_patterns=["*.json", "*.txt"])
            )
    elif pretrained:
        folder = model_files.resolve(pretrained, "tokenizer", config.revision)
        tokenizer = text.load_tokenizer(folder)
    elif made_before is not None and made_before.is_dir():
        tokenizer = text.load_tokenizer(local_copy(made_before))
    else:
        tokenizer = text.train_tokenizer(
            captions, encoder.config.get("vocab_size", 4096), encoder["max_position_embeddings"]
        )
    if not pretrained:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        encoder = replace(encoder, config=encoder.config | ids | {"vocab_size": len(tokenizer)})

    if isinstance(config, LoraConfig) and config.lora_rank is not None:
        unet = replace(unet, train=False, lora=_lora(config, config.lora_target_modules))
        if trains_encoder:
            encoder = replace(encoder, train=False, lora=_lora(config, config.lora_text_encoder_target_modules))
    if isinstance(config, TextualInversionConfig):
        unet = replace(unet, train=False)
        encoder = replace(encoder, new_tokens=_add_tokens(tokenizer, config))

    components = {"text_encoder": encoder, "unet": unet}
    # A pipeline that was trained on pixels has no VAE.
    if config.vae == "pretrained" and (not index or kinds.has_part(index, "vae")):
        components["vae"] = _pretrained(config, "vae", "AutoencoderKL", train=False)
    elif config.vae and config.vae != "pretrained":
        components["vae"] = _vae(config.vae)
    return _checked("StableDiffusionPipeline", components, config, tokenizer)


def _lora(config: LoraConfig, targets: list[str]) -> Lora:
    rank = int(config.lora_rank or 0)
    return Lora(rank=rank, alpha=config.lora_alpha or float(rank), dropout=config.lora_dropout, targets=tuple(targets))


def _add_tokens(tokenizer: CLIPTokenizer, config: TextualInversionConfig) -> NewTokens:
    """Adds textual inversion's tokens to the tokenizer: the new word, then the word with a number."""
    # In small letters, as the tokenizer reads prompts: of a word with capitals Diffusers finds the first vector only.
    word, start = str(config.placeholder_token).lower(), str(config.initializer_token)
    if word != config.placeholder_token:
        given = config.placeholder_token
        log.info("--placeholder_token %s: the tokenizer reads small letters; the word is %s", given, word)
    initializer = tokenizer.encode(start, add_special_tokens=False)
    if len(initializer) != 1:
        raise ConfigError(
            f"--initializer_token {start}: is {len(initializer)} tokens of this tokenizer, must be one; a shorter, "
            "more common word usually is"
        )
    first, tokens = add_word(tokenizer, word, config.num_vectors, "--placeholder_token", "choose another word")
    return NewTokens(placeholder=word, tokens=tokens, first=first, initializer=int(initializer[0]))


def check_new_word(spec: PipelineSpec, prompts: Iterable[str]) -> None:
    """Raises ConfigError unless all tokens of textual inversion's word fit into every prompt."""
    assert spec.text_encoder is not None
    assert spec.text_encoder.new_tokens is not None
    assert spec.tokenize is not None
    new, tokenize = spec.text_encoder.new_tokens, spec.tokenize
    ids = range(new.first, new.first + len(new.tokens))
    for prompt in prompts:
        if not np.isin(ids, tokenize(prompt)).all():
            raise ConfigError(
                f"prompt '{prompt}': is cut off before the end of {new.placeholder}, at the {len(tokenize(prompt))} "
                "tokens that the text encoder takes: shorten it (--prompt_templates), or lower --num_vectors"
            )


def objective(config: DiffusionConfig, spec: PipelineSpec, dtype: DTypeLike = np.float32) -> Objective:
    """What the denoiser of a pipeline learns; its numbers are of `dtype`."""
    weights = None
    if config.snr_gamma is not None:
        weights = noise_schedule.min_snr_weights(spec.alphas_cumprod, config.snr_gamma, spec.prediction_type)
    elif spec.prediction_type == "sample" and spec.text_encoder is None:
        weights = noise_schedule.sample_weights(spec.alphas_cumprod)
    return ddpm(spec.alphas_cumprod, spec.prediction_type, weights, dtype)


def _autoencoder_part(config: TrainConfig) -> str | None:
    """The subfolder of a pipeline's autoencoder; None for an autoencoder by itself."""
    source = str(config.pretrained_model_name_or_path)
    index = kinds.read_index(source, config.revision)
    if not index:
        alone = model_files.resolve(source, None, config.revision, allow_patterns=["config.json"]) / "config.json"
        return None if alone.is_file() else "vae"
    for name in ("vae", "vqvae"):
        if kinds.has_part(index, name):
            return name
    raise WeightsError(f"{source} is a {index['_class_name']} without an autoencoder: name a pipeline that has a vae")


def _pretrained(config: TrainConfig, name: str | None, kind: str, *, train: bool) -> Component:
    source = str(config.pretrained_model_name_or_path)
    with naming("--pretrained_model_name_or_path"):
        folder = model_files.resolve(source, name, config.revision, allow_patterns=["*.json"])
    return read_component(folder, kind, source, name, config.revision, config.variant, train=train)


def _check_kind(config: TrainConfig, accepted: Sequence[str]) -> dict[str, Any]:
    with naming("--pretrained_model_name_or_path"):
        return kinds.check_kind(str(config.pretrained_model_name_or_path), config.revision, accepted)


def _vae(source: str) -> Component:
    _check_part(source, "--vae", "vae")
    with naming("--vae"):
        folder = model_files.resolve(source, None, None, allow_patterns=["*.json"])
        return read_component(folder, "AutoencoderKL", source, None, None, None)


def _read_config(given: dict[str, Any] | str, option: str) -> dict[str, Any]:
    """A model config from a mapping, a .json file, or a folder or Hub id that holds config.json."""
    if isinstance(given, dict):
        values = given
    else:
        _check_part(given, option, option.removeprefix("--"))
        with naming(option):
            alone = Path(given).is_file()
            file = Path(given) if alone else model_files.resolve(given, allow_patterns=["*.json"]) / "config.json"
            values = model_files.read_json(file)
    return kinds.model_config(values)


def _check_part(source: str, option: str, part: str) -> None:
    """Raises WeightsError for a whole pipeline where one part of it is to be named."""
    folder = Path(source)
    if (folder / part).is_dir() and (folder / "model_index.json").is_file():
        raise WeightsError(f"{option} {source}: is a whole pipeline; give its folder {folder / part}")


def _scheduler(config: DiffusionConfig, kind: str) -> dict[str, Any]:
    if config.noise_scheduler is not None:
        values = {"_class_name": "DDPMScheduler"} | config.noise_scheduler
    elif config.pretrained_model_name_or_path:
        folder = model_files.resolve(config.pretrained_model_name_or_path, "scheduler", config.revision)
        values = model_files.read_json(folder / "scheduler_config.json")
    else:
        values = {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": config.ddpm_num_steps,
            "beta_schedule": config.ddpm_beta_schedule,
            # Latents have no bounds to clip to, and Diffusers' StableDiffusionPipeline turns clipping off and the
            # offset on in whatever it opens: written so, both sample alike.
            "clip_sample": kind == "DDPMPipeline",
            "steps_offset": int(kind == "StableDiffusionPipeline"),
        }
    if config.prediction_type:
        values = values | {"prediction_type": config.prediction_type}
    return values


def _checked(
    kind: str, components: dict[str, Component], config: DiffusionConfig, tokenizer: CLIPTokenizer | None = None
) -> PipelineSpec:
    scheduler = _scheduler(config, kind)
    check_variant(components.values(), config.variant)
    spec = PipelineSpec(
        kind=kind,
        components=components,
        scheduler=scheduler,
        resolution=config.resolution,
        alphas_cumprod=noise_schedule.alphas_cumprod_from_config(samplers.noise_config(scheduler)),
        tokenizer=tokenizer,
    )
    if spec.unet.train:
        unet = _sized(spec.unet, config.resolution // spec.vae_factor)
        spec = replace(spec, components=components | {"unet": unet})
    unet, vae, encoder = spec.unet, spec.vae, spec.text_encoder
    _check_resolution(config.resolution, spec.size_factor)
    if unet["in_channels"] != unet["out_channels"]:
        raise ConfigError(
            f"UNet with in_channels {unet['in_channels']} and out_channels {unet['out_channels']}: inpainting and "
            f"learned-variance models cannot be trained yet; use a UNet that has both equal"
        )
    if vae and vae["latent_channels"] != unet["in_channels"]:
        raise ConfigError(
            f"the VAE has {vae['latent_channels']} latent channels, the UNet takes {unet['in_channels']}: use "
            "a pair made for each other"
        )
    _check_channels(spec)
    if unet["addition_embed_type"] is not None:
        raise ConfigError(
            f"UNet with addition_embed_type {unet['addition_embed_type']!r} (SDXL): the models are here, training "
            "them is not yet; use a Stable Diffusion 1.x or 2.x pipeline"
        )
    if encoder and encoder["hidden_size"] != unet["cross_attention_dim"]:
        raise ConfigError(
            f"text encoder of hidden_size {encoder['hidden_size']} and UNet of cross_attention_dim "
            f"{unet['cross_attention_dim']}: they must be equal"
        )
    if spec.prediction_type == "epsilon" and spec.alphas_cumprod[-1] == 0:
        raise ConfigError(
            "rescale_betas_zero_snr with prediction_type epsilon: at the last timestep there is only noise to predict "
            "noise from; use v_prediction"
        )
    return spec


def _sized(component: Component, size: int) -> Component:
    """Notes the size that a model trains at: pipelines draw images of it, autoencoders divide larger ones by it."""
    return replace(component, config=component.config | {"sample_size": size})


def _check_resolution(resolution: int, multiple: int) -> None:
    if resolution % multiple:
        raise ConfigError(
            f"--resolution {resolution}: must be a multiple of {multiple}, by which this pipeline divides it: "
            f"{nearest_multiples(resolution, multiple)}"
        )


def _check_channels(spec: PipelineSpec) -> None:
    if spec.image_channels not in (1, 3):
        raise ConfigError(
            f"images have 1 (grey) or 3 (RGB) channels, this pipeline makes {spec.image_channels}: set the UNet's "
            "in_channels, or give --vae to train on latents"
        )
