"""Files of prompts, each with options of its own: one a line, or YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from flax_diffusion.core.config.spellings import checked
from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.io.untrusted import parse_yaml, read_text

FLAGS = {
    "w": "width", "h": "height", "s": "num_inference_steps", "g": "guidance_scale", "l": "guidance_scale",
    "seed": "seed", "d": "seed", "n": "negative_prompt",
}  # fmt: skip
"""Short names of the options: those of Kohya's sample prompts, and of the tools that took them over."""
MAX_BYTES = 2**20
"""Largest size of a file of prompts."""
MAX_SIDE = 2**14
"""Largest height and width of a picture, in pixels."""
_FLAG = re.compile(r"(?:^|\s)--([A-Za-z]\S*)")


class Prompt(BaseModel):
    """A prompt, with the options of its pictures; None for those of the call.

    Attributes:
        prompt: The text.
        negative_prompt: Text to guide away from.
        width: Width of the pictures, in pixels.
        height: Their height, in pixels.
        num_inference_steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        seed: Seed of the noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str | None = None
    width: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    height: int | None = Field(default=None, ge=1, le=MAX_SIDE)
    num_inference_steps: int | None = Field(default=None, ge=1)
    guidance_scale: FiniteFloat | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**32)

    def given(self) -> dict[str, Any]:
        """Return the options that the prompt has of its own, by name."""
        return self.model_dump(exclude={"prompt"}, exclude_none=True)


def read_prompts(file: str, option: str) -> list[Prompt]:
    """Read a file of prompts.

    Args:
        file: A text file with a prompt a line, such as `a dog --w 768 --h 512 --s 30 --g 7 --seed 1 --n "a cat"`, where
            empty lines, and lines that begin with #, are passed over; or a `.yaml` file with a list of such lines, and
            of mappings by the names of `Prompt`.
        option: The option that names it, for messages.

    Raises:
        ConfigError: If it cannot be read, holds no prompt, or has a flag or a value that is none; with the line's
            number.
    """
    path = as_path(file)
    try:
        entries = _entries(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--{option} {file}: cannot be read: {reason}; name a file with a prompt a line") from error
    if not entries:
        raise ConfigError(f"--{option} {file}: holds no prompt; write one a line")
    prompts = []
    for place, entry in entries:
        where = f"--{option} {file}, {place}"
        values = entry if isinstance(entry, dict) else _parsed(entry, where)
        for name in values:
            if name not in Prompt.model_fields:
                raise ConfigError(f"{where}: unknown option '{name}'{nearest(name, Prompt.model_fields)}")
        prompts.append(checked(Prompt, values, where))
    return prompts


def _entries(path: Path) -> list[tuple[str, Any]]:
    """Return the prompts of a file as they are written, each with its place.

    Raises:
        ValueError: If the file is not text, or not a list in YAML.
    """
    text = read_text(path, MAX_BYTES)
    if path.suffix not in (".yaml", ".yml"):
        lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        return [(place, line) for place, line in lines if line and not line.startswith("#")]
    values = parse_yaml(text)
    if not isinstance(values, list) or not all(isinstance(value, dict | str) for value in values):
        raise ValueError("it must be a list of prompts, as text or as mappings")
    return [(f"entry {number}", value) for number, value in enumerate(values, 1)]


def _parsed(line: str, where: str) -> dict[str, Any]:
    """Return the options of a line by name, as text."""
    found = list(_FLAG.finditer(line))
    starts = [*(match.start() for match in found), len(line)]
    values: dict[str, Any] = {"prompt": line[: starts[0]].strip()}
    for match, end in zip(found, starts[1:], strict=True):
        flag, text = match[1], line[match.end() : end].strip()
        if (name := FLAGS.get(flag)) is None:
            raise ConfigError(f"{where}: unknown flag --{flag}; use {', '.join(f'--{short}' for short in FLAGS)}")
        if name in values:
            raise ConfigError(f"{where}: --{flag} says the {name} a second time; drop one")
        values[name] = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    if not values["prompt"]:
        raise ConfigError(f"{where}: has no prompt before its flags; write one")
    return values
