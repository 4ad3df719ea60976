"""How files come from the Hugging Face Hub, and the keywords by which `from_pretrained` is told."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """How files come from the Hub; the fields are arguments of `huggingface_hub.snapshot_download`.

    Attributes:
        cache_dir: Folder of the cache; None for the usual one.
        force_download: Download again what the cache holds.
        local_files_only: Read the cache alone, and ask no server.
        token: Token of the Hub; True for the one of the log-in, False for none, None for what there is.
    """

    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False
    token: str | bool | None = None

    def given(self) -> dict[str, Any]:
        """Return the fields that are not left at their defaults."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}


DEFAULT_HUB = HubOptions()

REPLACED = {
    "proxies": "the Hub's client reads proxies from HTTPS_PROXY and HTTP_PROXY: set these",
    "mirror": "the Hub's client reads the address of a mirror from HF_ENDPOINT: set that",
    "resume_download": "downloads always go on where they stopped: leave it out",
}
"""Keywords that nothing reads any more, and what takes their place."""

HUB_KEYWORDS = (*(field.name for field in fields(HubOptions)), "use_auth_token", *REPLACED)
"""All keywords that `take_hub_options` takes out."""


def take_hub_options(owner: str, keywords: dict[str, Any]) -> HubOptions:
    """Take the keywords of the Hub out of a dictionary; the others stay in it.

    Args:
        owner: Name of the class, for warnings.
        keywords: Keywords of a call to `from_pretrained` or `load_config`; changed in place.

    Returns:
        How files come from the Hub.
    """
    for name, instead in REPLACED.items():
        if keywords.pop(name, None):
            warnings.warn(f"{owner} does not read {name}: {instead}", stacklevel=4)
    old_token = keywords.pop("use_auth_token", None)  # the name of token before 2023
    given = {field.name: keywords.pop(field.name, None) for field in fields(HubOptions)}
    if given["token"] is None:
        given["token"] = old_token
    return HubOptions(**{name: value for name, value in given.items() if value is not None})
