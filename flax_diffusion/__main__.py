"""All commands by one name: `flax-diffusion COMMAND …`, or `python -m flax_diffusion COMMAND …`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from flax_diffusion.core.display import first_line
from flax_diffusion.core.errors import unknown


class _Command(NamedTuple):
    """A command.

    Attributes:
        module: Module whose `main` runs it.
        about: What it does, for the help.
        first: Words that come before those of the user.
        says: What it says first that it does; "" for nothing.
    """

    module: str
    about: str
    first: tuple[str, ...] = ()
    says: str = ""


COMMANDS = {
    "train": _Command("flax_diffusion.train", "train a model", says="training"),
    "generate": _Command("flax_diffusion.generate", "draw pictures with a model"),
    "evaluate": _Command("flax_diffusion.evaluate", "judge pictures by FID and its kin"),
    "inspect": _Command("flax_diffusion.data", "look at the data of a run before it starts", ("inspect",)),
    "report": _Command("flax_diffusion.report", "make the page of a run again, or compare runs"),
    "precompute": _Command(
        "flax_diffusion.precompute", "compute latents and text embeddings once, for many runs", says="precomputing"
    ),
    "convert": _Command("flax_diffusion.convert", "convert models and LoRA files between formats"),
    "post_hoc_ema": _Command("flax_diffusion.post_hoc_ema", "choose the width of a moving average after training"),
    "parity": _Command("flax_diffusion.parity", "compare JAX with PyTorch"),
    "plan": _Command("tpu.plan", "say what a run needs on a TPU, without one"),
    "migrate": _Command("flax_diffusion.migrate", "rewrite code for Diffusers' and Transformers' Flax classes"),
}
"""All commands by name."""


def run(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: The command's name and its words; None for those of this process.

    Raises:
        ConfigError: For an unknown command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:14} {command.about}" for name, command in COMMANDS.items())
        sys.stdout.write(
            f"usage: flax-diffusion COMMAND [flags]\n\n{rows}\n\n`flax-diffusion COMMAND --help` says more.\n"
        )
        return
    if words[0] not in COMMANDS:
        raise unknown("command", words[0], COMMANDS)
    command = COMMANDS[words[0]]
    if command.says:
        first_line.say(command.says, "JAX", words[1:])
    importlib.import_module(command.module).main([*command.first, *words[1:]])


def main() -> None:
    """Run the command of this process, and turn its errors for users into one line on stderr."""
    from flax_diffusion.core.cli import command_line  # which takes most of a second, after the first line

    command_line.main_guard(run)


if __name__ == "__main__":
    main()
