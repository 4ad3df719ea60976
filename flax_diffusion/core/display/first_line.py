"""The first line of a command in a terminal, which comes before anything is imported that takes long."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from flax_diffusion.core.display import console

RANKS = ("RANK", "JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
"""Environment variables that launchers of several processes number these by."""

_SILENT = re.compile(
    r"^(?:--)?(?:quiet(?:[=:\s]\s*(?:true|yes|on|1))?|log_level[=:\s]\s*['\"]?(?:warning|error)['\"]?)\s*(?:#.*)?$",
    re.MULTILINE | re.IGNORECASE,
)
_HELP = {"-h", "--help"}


def say(command: str, framework: str, argv: list[str] | None = None) -> None:
    """Say in a terminal that a command has begun, unless its words ask for help or for silence.

    Args:
        command: What it does, such as "training".
        framework: What it does it with: "JAX" or "PyTorch".
        argv: Its words; None for those of this process.
    """
    words = sys.argv[1:] if argv is None else argv
    here = console.current()
    here.main = is_first_process()
    if here.live and not _HELP & set(words) and not is_silent(words):
        here.say(f"flax-diffusion: {command} with {framework}; reading the options …")


def is_first_process() -> bool:
    """Return whether this is the first process of its run, as far as the environment says; the backend knows it."""
    return all(os.environ.get(name, "0") in ("", "0") for name in RANKS)


def is_silent(words: list[str]) -> bool:
    """Return whether the words of a command, or the recipe that they name, ask for silence."""
    text = re.sub(r" (?=--)", "\n", " ".join(words))
    found = re.search(r"^--config[= ](\S+)", text, re.MULTILINE)
    recipe = Path(found[1]) if found else None
    if recipe is not None and recipe.is_file():
        text += "\n" + recipe.read_text(errors="replace")
    return bool(_SILENT.search(text))
