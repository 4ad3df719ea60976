"""Options of runs as a page shows them: as text, those first that are not the defaults, without the home folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_diffusion.core.tasks.task import TASKS

_LOCATIONS = ("output_dir", "logging_dir")
"""Options that two runs always differ by, and that say nothing of them."""


def without_home(words: list[str]) -> str:
    """Join the words of a command for a shell, with `~/` in place of the home folder."""
    return " ".join(_quoted(shown_path(word)) for word in words)


def _quoted(word: str) -> str:
    return f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word)


def shown_path(text: str) -> str:
    """Return a text with `~` in place of the home folder of this user, where it starts with that."""
    home = str(Path.home())
    return f"~{text[len(home) :]}" if home != "/" and text.startswith(f"{home}/") else text


def shown_value(value: Any) -> str:
    """Return the value of an option as text."""
    if isinstance(value, str):
        return shown_path(value)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return ", ".join(shown_path(one) for one in value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return str(value) if value != [] else "none"


def changed_options(task: str, options: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the default as text of each option that has another value; of an unknown task all options, with None.

    Args:
        task: Name of the task.
        options: Values by option, as a run's config.yaml has them.
    """
    if task not in TASKS:
        return dict.fromkeys(options)
    fields, changed = TASKS[task].config_class.model_fields, {}
    for name, value in options.items():
        if name not in fields:
            changed[name] = None
            continue
        default = fields[name].get_default(call_default_factory=True)
        default = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
        if value != default:
            changed[name] = "" if fields[name].is_required() else shown_value(default)
    return changed


def differing_options(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options by which runs differ, but for where they are stored.

    Args:
        runs: Values by option of each run.
    """
    names = dict.fromkeys(name for options in runs for name in options)
    missing = object()
    return [
        name
        for name in names
        if name not in _LOCATIONS and any(run.get(name, missing) != runs[0].get(name, missing) for run in runs[1:])
    ]
