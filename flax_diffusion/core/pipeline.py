"""What is trained, as plain data: the pipeline's models by their configs, its tokenizer and its noise scheduler.

Both backends build their modules from the same `PipelineSpec`. It is read and checked before any weight is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flax_diffusion.core import hub, noise_schedule
from flax_diffusion.core.config import TextConfig, TextToImageConfig, TrainConfig
from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.files import write_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TUTORIAL_UNET: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
"""The UNet of Diffusers' unconditional tutorial and script, used when none is named."""

_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {"in_channels": 3, "out_channels": 3, "down_block_types": [""] * 4},
    "UNet2DConditionModel": {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": [""] * 4,
        "cross_attention_dim": 1280,
        "addition_embed_type": None,
    },
    "AutoencoderKL": {"in_channels": 3, "latent_channels": 4, "block_out_channels": [64], "scaling_factor": 0.18215},
    "CLIPTextModel": {"hidden_size": 512, "max_position_embeddings": 77},
}
"""Defaults of the Diffusers and Transformers classes for the keys that this module reads."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One model: its PyTorch class, its config, and where its weights are (None: drawn at random)."""

    kind: str
    config: dict[str, Any]
    weights: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    train: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key, _CLASS_DEFAULTS[self.kind].get(key))


@dataclass(frozen=True, kw_only=True)
class PipelineSpec:
    """A pipeline to train. `components` are named as the subfolders of a Diffusers pipeline."""

    kind: str
    components: dict[str, Component]
    scheduler: dict[str, Any]
    resolution: int
    alphas_cumprod: np.ndarray = field(repr=False)
    tokenizer: CLIPTokenizer | None = None

    @property
    def unet(self) -> Component:
        """The denoiser."""
        return self.components["unet"]

    @property
    def vae(self) -> Component | None:
        """The autoencoder, or None in pixel space."""
        return self.components.get("vae") or self.components.get("vqvae")

    @property
    def text_encoder(self) -> Component | None:
        """The text encoder, or None when there are no captions."""
        return self.components.get("text_encoder")

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon, v_prediction or sample."""
        return self.scheduler.get("prediction_type", "epsilon")

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
        side = self.resolution // self.vae_factor
        return (self.unet["in_channels"], side, side)


def unconditional(config: TrainConfig) -> PipelineSpec:
    """The pipeline that `train unconditional` trains: a UNet2DModel, in pixel or latent space."""
    if config.pretrained_model_name_or_path:
        unet = _pretrained(config, "unet", "UNet2DModel", train=True)
    else:
        given = TUTORIAL_UNET if config.unet is None else _read_config(config.unet, "--unet")
        unet = Component(kind="UNet2DModel", config={"sample_size": config.resolution} | given, train=True)
    components = {"unet": unet}
    if config.vae:
        components["vqvae"] = _vae(config.vae)
    kind = "LDMPipeline" if config.vae else "DDPMPipeline"
    return _checked(kind, components, config)


def text_to_image(config: TextConfig, captions: Iterable[str], run_tokenizer: Path) -> PipelineSpec:
    """The pipeline of every task with prompts: Stable Diffusion 1.x or 2.x, or one from scratch.

    Args:
        config: The run's options.
        captions: Every caption; read only when a tokenizer must be made.
        run_tokenizer: Where this run keeps the tokenizer it made; used again on resume.
    """
    from flax_diffusion.core.data import captions as text

    pretrained = config.pretrained_model_name_or_path
    if pretrained:
        encoder = _pretrained(config, "text_encoder", "CLIPTextModel", train=config.train_text_encoder)
        unet = _pretrained(config, "unet", "UNet2DConditionModel", train=True)
    else:
        assert isinstance(config, TextToImageConfig)
        encoder = Component(
            kind="CLIPTextModel", config=_read_config(config.text_encoder, "--text_encoder"), train=True
        )
        unet_config = {"sample_size": config.resolution} | _read_config(config.unet, "--unet")
        unet = Component(kind="UNet2DConditionModel", config=unet_config, train=True)

    if config.tokenizer_name:
        tokenizer = text.load_tokenizer(hub.resolve(config.tokenizer_name, allow_patterns=["*.json", "*.txt"]))
    elif pretrained:
        folder = hub.resolve(pretrained, "tokenizer", config.revision)
        tokenizer = text.load_tokenizer(folder)
    elif run_tokenizer.is_dir():
        tokenizer = text.load_tokenizer(run_tokenizer)
    else:
        tokenizer = text.train_tokenizer(
            captions, encoder.config.get("vocab_size", 4096), encoder["max_position_embeddings"]
        )
    if not pretrained:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        encoder = replace(encoder, config=encoder.config | ids | {"vocab_size": len(tokenizer)})

    components = {"text_encoder": encoder, "unet": unet}
    if config.vae == "pretrained":
        components["vae"] = _pretrained(config, "vae", "AutoencoderKL", train=False)
    elif config.vae:
        components["vae"] = _vae(config.vae)
    return _checked("StableDiffusionPipeline", components, config, tokenizer)


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

    index = hub.read_json(hub.resolve(source, None, revision, allow_patterns=["model_index.json"]) / "model_index.json")
    kind = index.get("_class_name")
    if kind not in _PIPELINES:
        raise WeightsError(f"{source}: is a {kind}; known pipelines are {', '.join(_PIPELINES)}")
    components = {}
    for name, model in _PIPELINES[kind].items():
        if index.get(name, [None])[0] is not None:
            folder = hub.resolve(source, name, revision, allow_patterns=["*.json"])
            components[name] = _component(folder, model, source, name, revision, variant)
    scheduler = hub.read_json(hub.resolve(source, "scheduler", revision) / "scheduler_config.json")
    tokenizer = text.load_tokenizer(hub.resolve(source, "tokenizer", revision)) if "tokenizer" in index else None
    unet = components["unet"]
    spec = PipelineSpec(
        kind=kind,
        components=components,
        scheduler=scheduler,
        resolution=1,
        alphas_cumprod=noise_schedule.alphas_cumprod_from_config(scheduler),
        tokenizer=tokenizer,
    )
    return replace(spec, resolution=unet["sample_size"] * spec.vae_factor)


_PIPELINES: dict[str, dict[str, str]] = {
    "DDPMPipeline": {"unet": "UNet2DModel"},
    "DDIMPipeline": {"unet": "UNet2DModel"},
    "LDMPipeline": {"unet": "UNet2DModel", "vqvae": "AutoencoderKL"},
    "StableDiffusionPipeline": {
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
}
"""Model classes of the pipelines that are known here, by component."""


def _pretrained(config: TrainConfig, name: str, kind: str, *, train: bool) -> Component:
    source = str(config.pretrained_model_name_or_path)
    folder = hub.resolve(source, name, config.revision, allow_patterns=["*.json"])
    return _component(folder, kind, source, name, config.revision, config.variant, train=train)


def _vae(source: str) -> Component:
    folder = hub.resolve(source, None, None, allow_patterns=["*.json"])
    return _component(folder, "AutoencoderKL", source, None, None, None)


def _component(
    folder: Path,
    kind: str,
    source: str,
    subfolder: str | None,
    revision: str | None,
    variant: str | None,
    *,
    train: bool = False,
) -> Component:
    values = hub.read_json(folder / "config.json")
    found = values.get("_class_name") or next(iter(values.get("architectures") or []), kind)
    if found.removeprefix("Flax") != kind:
        raise WeightsError(f"{source}/{subfolder or ''}: holds a {found}, this task needs a {kind}")
    return Component(
        kind=kind,
        config={key: value for key, value in values.items() if not key.startswith("_")},
        weights=source,
        subfolder=subfolder,
        revision=revision,
        variant=variant,
        train=train,
    )


def _read_config(given: dict[str, Any] | str | None, option: str) -> dict[str, Any]:
    """A model config from a mapping, a .json file, or a folder or Hub id that holds config.json."""
    if isinstance(given, dict):
        values = given
    elif given is not None and Path(given).is_file():
        values = hub.read_json(Path(given))
    elif given is not None:
        values = hub.read_json(hub.resolve(given, allow_patterns=["*.json"]) / "config.json")
    else:
        raise ConfigError(f"{option}: give a mapping, a .json file, or a folder that holds config.json")
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _scheduler(config: TrainConfig, kind: str) -> dict[str, Any]:
    if config.noise_scheduler is not None:
        values = {"_class_name": "DDPMScheduler"} | config.noise_scheduler
    elif config.pretrained_model_name_or_path:
        folder = hub.resolve(config.pretrained_model_name_or_path, "scheduler", config.revision)
        values = hub.read_json(folder / "scheduler_config.json")
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
    kind: str, components: dict[str, Component], config: TrainConfig, tokenizer: CLIPTokenizer | None = None
) -> PipelineSpec:
    scheduler = _scheduler(config, kind)
    spec = PipelineSpec(
        kind=kind,
        components=components,
        scheduler=scheduler,
        resolution=config.resolution,
        alphas_cumprod=noise_schedule.alphas_cumprod_from_config(scheduler),
        tokenizer=tokenizer,
    )
    unet, vae, encoder = spec.unet, spec.vae, spec.text_encoder
    levels = len(unet["down_block_types"]) - 1
    multiple = spec.vae_factor * 2**levels
    if config.resolution % multiple:
        below, above = config.resolution // multiple * multiple, -(-config.resolution // multiple) * multiple
        raise ConfigError(
            f"--resolution {config.resolution}: this pipeline halves it {multiple.bit_length() - 1} times, so it must "
            f"be a multiple of {multiple}: {f'{below} or ' if below else ''}{above}"
        )
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
    if spec.image_channels not in (1, 3):
        raise ConfigError(
            f"images have 1 (grey) or 3 (RGB) channels, this pipeline makes {spec.image_channels}: set the UNet's "
            "in_channels, or give --vae to train on latents"
        )
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


def check_prompts(spec: PipelineSpec, prompts: list[str]) -> None:
    """Raises ConfigError unless there are prompts exactly where the pipeline takes them."""
    if (spec.tokenizer is not None) != bool(prompts):
        fix = "drop --prompt" if prompts else "give at least one --prompt"
        raise ConfigError(f"a {spec.kind} with {len(prompts)} prompts: {fix}")


def loss_weights(config: TrainConfig, spec: PipelineSpec) -> np.ndarray:
    """The loss weight of each timestep, float32 of shape (num_train_timesteps,)."""
    if config.snr_gamma is not None:
        return noise_schedule.min_snr_weights(spec.alphas_cumprod, config.snr_gamma, spec.prediction_type)
    if spec.prediction_type == "sample" and spec.text_encoder is None:
        return noise_schedule.sample_weights(spec.alphas_cumprod)
    return np.ones(len(spec.alphas_cumprod), np.float32)


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
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    scheduler = spec.scheduler | {"_class_name": index["scheduler"][1]}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def save_tokenizer(spec: PipelineSpec, folder: Path) -> None:
    """Writes the tokenizer, if there is one; a resumed run reads it from there."""
    if spec.tokenizer is not None:
        spec.tokenizer.save_pretrained(folder / "tokenizer")
