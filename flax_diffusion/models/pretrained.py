"""The keywords that `from_pretrained` of Diffusers 0.39 and of Transformers 4.57 took, and what they mean here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax_diffusion.core.errors import ConfigError, WeightsError, nearest
from flax_diffusion.core.io.hub_options import HUB_KEYWORDS, HubOptions, take_hub_options
from flax_diffusion.core.spec import weight_files

KEYWORDS = (*HUB_KEYWORDS, "from_pt", "use_safetensors")
"""All keywords that `take_loading_keywords` takes out."""


def take_loading_keywords(owner: str, keywords: dict[str, Any]) -> tuple[HubOptions, bool]:
    """Take the keywords that say where weights come from out of a dictionary; the others stay in it.

    Args:
        owner: Name of the class, for warnings and errors.
        keywords: Keywords of a call; changed in place.

    Returns:
        How files come from the Hub, and whether only files in PyTorch's format are wanted.

    Raises:
        ConfigError: If pickled weights are asked for.
    """
    hub = take_hub_options(owner, keywords)
    from_pt, safetensors = keywords.pop("from_pt", False), keywords.pop("use_safetensors", None)
    if safetensors is False:
        raise ConfigError(
            f"{owner}.from_pretrained does not read pickled weights, which use_safetensors=False asks for: leave it out"
        )
    return hub, bool(from_pt or safetensors)


def check_torch_format(folder: Any, base: str, variant: str | None) -> None:
    """Raise WeightsError for a folder that holds Flax's msgpack and no safetensors, where PyTorch's format is wanted.

    Args:
        folder: Folder with the files.
        base: File name without extension.
        variant: Variant such as "fp16"; None for the plain files.
    """
    if not weight_files.has_weights(folder, base, variant) and any(
        path.name.endswith(".msgpack") for path in weight_files.files_of(folder, base, variant)
    ):
        raise WeightsError(
            f"{folder} holds Flax's msgpack and no safetensors, which from_pt=True and use_safetensors=True ask for: "
            "leave them out"
        )


def unknown_keyword(owner: str, name: str, value: object, known: Iterable[str]) -> ConfigError:
    """Make the error for a keyword that is neither a config key nor says how to load.

    Args:
        owner: Name of the class.
        name: The keyword.
        value: Its value.
        known: Config keys, and names of arguments.
    """
    return ConfigError(
        f"{owner} knows no config key {name!r} (value {value!r}): correct or remove it"
        f"{nearest(name, [*known, *KEYWORDS])}"
    )
