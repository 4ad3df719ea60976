"""Which pipelines are known here, what they are made of, and what a folder says that it is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from flax_diffusion.core.errors import WeightsError
from flax_diffusion.core.io import model_files

PARTS: dict[str, dict[str, str]] = {
    "DDPMPipeline": {"unet": "UNet2DModel"},
    "DDIMPipeline": {"unet": "UNet2DModel"},
    "PNDMPipeline": {"unet": "UNet2DModel"},
    "LDMPipeline": {"unet": "UNet2DModel", "vqvae": "AutoencoderKL"},
    "StableDiffusionPipeline": {
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    },
}
"""Model classes of the pipelines that are known here, by component."""

_SAME_PARTS: dict[str, str] = {
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
}
TEXT_KINDS = ("StableDiffusionPipeline",)
UNCONDITIONAL_KINDS = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline")

FLAX_ONLY_KEYS = frozenset({"split_head_dim", "use_memory_efficient_attention"})
"""Config keys of the Flax releases' UNets: how they computed attention, with one result whatever the value."""


def model_config(values: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the model itself, less notes of the program that wrote it."""
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in FLAX_ONLY_KEYS}


def read_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """Reads what a pipeline's folder says of itself; nothing where it has no model_index.json.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        The index, with the kind that is known here as its class: `FlaxStableDiffusionPipeline` and the pipelines that
        change images are made of the parts of a StableDiffusionPipeline.
    """
    folder = model_files.resolve(source, None, revision, allow_patterns=["model_index.json", "config.json"])
    if not (folder / "model_index.json").is_file():
        return {}
    index = model_files.read_json(folder / "model_index.json")
    kind = str(index.get("_class_name")).removeprefix("Flax")
    return index | {"_class_name": _SAME_PARTS.get(kind, kind)}


def has_part(index: dict[str, Any], name: str) -> bool:
    """Whether an index names a class for a part, which an empty pair does not."""
    return index.get(name) not in (None, [None, None])


def check_kind(source: str, revision: str | None, kinds: Collection[str]) -> dict[str, Any]:
    """Refuses what is no pipeline of the right kind. A folder of parts without an index is taken at its word.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        kinds: The right ones.

    Returns:
        The index; empty where the folder has none.

    Raises:
        WeightsError: If it is of another kind, or a model by itself.
    """
    index = read_index(source, revision)
    if index and index["_class_name"] not in kinds:
        raise WeightsError(f"{source} is a {index['_class_name']}: {_fix(kinds)}")
    if not index:
        lone = (
            model_files.resolve(source, None, revision, allow_patterns=["model_index.json", "config.json"])
            / "config.json"
        )
        if lone.is_file():
            values = model_files.read_json(lone)
            found = values.get("_class_name") or " ".join(map(str, values.get("architectures") or ["model"]))
            raise WeightsError(f"{source} is a {found} by itself, not a pipeline: {_fix(kinds)}")
    return index


def _fix(kinds: Collection[str]) -> str:
    wanted = "a Stable Diffusion 1.x or 2.x pipeline (SDXL is not trained or drawn yet)"
    return f"use {wanted if set(kinds) == set(TEXT_KINDS) else 'one of ' + ', '.join(kinds)}"
