"""The models that options name. Their configs are read and checked before any weights are read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError, WeightsError, naming, nearest_multiples
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.autoencoder import AUTOENCODER_KL
from flax_diffusion.core.families.family import Family, ModelClass
from flax_diffusion.core.io import model_files
from flax_diffusion.core.spec.adapters import Overlay
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training, read_component


def pretrained(config: TrainConfig, name: str | None, model: ModelClass, *, train: bool) -> Component:
    """Read the config of a part of --pretrained_model_name_or_path.

    Args:
        config: The run's options.
        name: Subfolder of the part; None for a model without a pipeline.
        model: The class that it must be of.
        train: Whether all of it trains.

    Raises:
        WeightsError: If it is missing, or of another class.
    """
    source = str(config.pretrained_model_name_or_path)
    with naming("--pretrained_model_name_or_path"):
        folder = model_files.resolve(source, name, config.revision, allow_patterns=["*.json"])
    training = Training.ALL if train else Training.NOTHING
    return read_component(folder, model.name, source, name, config.revision, config.variant, training)


def from_scratch(given: dict[str, Any] | str, option: str, model: ModelClass) -> Component:
    """Return a model to draw at random, whose config an option gives.

    Args:
        given: A mapping, a .json file, or a folder or Hub id that holds config.json.
        option: Its name, for messages.
        model: Class of the model.

    Raises:
        UserError: If there is no such config.
    """
    return Component(kind=model.name, config=_read_config(given, option), training=Training.ALL)


def check_pipeline(config: TrainConfig, families: Collection[Family]) -> dict[str, Any]:
    """Refuse a --pretrained_model_name_or_path of other families, and return its model_index.json."""
    with naming("--pretrained_model_name_or_path"):
        return folders.check_kind(str(config.pretrained_model_name_or_path), config.revision, families)


def frozen_vae(source: str) -> Component:
    """Read the config of the autoencoder that --vae names."""
    check_part(source, "--vae", "vae")
    with naming("--vae"):
        folder = model_files.resolve(source, None, None, allow_patterns=["*.json"])
        return read_component(folder, AUTOENCODER_KL.name, source, None, None, None)


def _read_config(given: dict[str, Any] | str, option: str) -> dict[str, Any]:
    """Read a model config from a mapping, a .json file, or a folder or Hub id that holds config.json."""
    if isinstance(given, dict):
        values = given
    else:
        check_part(given, option, option.removeprefix("--"))
        with naming(option):
            alone = Path(given).is_file()
            file = Path(given) if alone else model_files.resolve(given, allow_patterns=["*.json"]) / "config.json"
            values = model_files.read_json(file)
    return folders.model_config(values)


def check_part(source: str, option: str, part: str) -> None:
    """Raise WeightsError for a whole pipeline where one part of it is to be named."""
    folder = Path(source)
    if (folder / part).is_dir() and (folder / "model_index.json").is_file():
        raise WeightsError(f"{option} {source}: is a whole pipeline; give its folder {folder / part}")


def inpainting(unet: Component) -> Component:
    """Return a UNet that also takes a mask and the latents of the rest of the picture, by weights that are zero.

    Args:
        unet: A UNet, which is returned as it is if it takes more than the sample already.

    Reference:
        The model card of runwayml/stable-diffusion-inpainting; Rombach et al., https://arxiv.org/abs/2112.10752.
    """
    channels = 2 * unet["out_channels"] + 1
    if unet["in_channels"] != unet["out_channels"]:
        return unet
    overlay = Overlay(widened={"conv_in.weight": channels}) if unet.weights else None
    return replace(unet, config=unet.config | {"in_channels": channels}, overlay=overlay)


def vae_factor(vae: Component | None) -> int:
    """Return the pixels per latent and side of an autoencoder; 1 for None, in pixel space."""
    return 2 ** (len(vae["block_out_channels"]) - 1) if vae else 1


def sized(component: Component, size: int) -> Component:
    """Note the size that a model trains at: pipelines draw images of it, autoencoders divide larger ones by it."""
    return replace(component, config=component.config | {"sample_size": size})


def check_resolution(resolution: int, multiple: int) -> None:
    """Raise ConfigError unless a pipeline can divide pictures of a size, by a multiple that it needs."""
    if resolution % multiple:
        raise ConfigError(
            f"--resolution {resolution}: must be a multiple of {multiple}, by which this pipeline divides it: "
            f"{nearest_multiples(resolution, multiple)}"
        )


def check_channels(spec: PipelineSpec) -> None:
    """Raise ConfigError for a pipeline whose pictures are neither grey nor RGB."""
    if spec.image_channels not in (1, 3):
        raise ConfigError(
            f"images have 1 (grey) or 3 (RGB) channels, this pipeline makes {spec.image_channels}: set the UNet's "
            "in_channels, or give --vae to train on latents"
        )
