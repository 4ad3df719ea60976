"""Writing small files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name beside it and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as Hugging Face's libraries do: two spaces, sorted keys, a final newline."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
