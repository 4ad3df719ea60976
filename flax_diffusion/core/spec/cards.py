"""The model card of a pipeline or of adapters: README.md, as the Hugging Face Hub shows it.

Reference: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flax_diffusion.core.errors import SECRET
from flax_diffusion.core.io.files import as_path, write_text
from flax_diffusion.core.spec.adapters import FileNames, file_names
from flax_diffusion.core.spec.pipeline import PipelineSpec

CARD_FILE = "README.md"
MARK = "<!-- flax_diffusion writes this card anew; delete this line to keep your own text. -->"
"""Line of a card that is ours to replace; a file without it stays."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSES = {
    "CompVis/stable-diffusion-v1-": "creativeml-openrail-m",
    "runwayml/stable-diffusion-": "creativeml-openrail-m",
    "stable-diffusion-v1-5/": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-xl-": "openrail++",
}
"""Licences of published models, by how their names start; what is trained from one has the same."""
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model card says of how the model was made.

    Attributes:
        title: Name of the model.
        made: What was done, such as "trained".
        tags: Tags for the Hub.
        base: Folder or Hub id of the model that the run started from; None where it was made from nothing.
        dataset: Name of the dataset on the Hub; None for data of another place.
        command: The command that makes it, without secrets.
        prompts: Prompts of the run, by option.
        grid: Path of a sheet of samples, relative to the card; None for none.
        metrics: What the model is worth, by name; empty where nothing was measured.
        step: Optimizer steps.
    """

    title: str
    made: str
    tags: Sequence[str] = ()
    base: str | None = None
    dataset: str | None = None
    command: str = ""
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    grid: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


_LOADS = {"lora": "load_lora_weights", "textual_inversion": "load_textual_inversion"}
"""Methods of Diffusers' pipelines that read adapters, by their kind."""


def is_ours(folder: Path) -> bool:
    """Return whether the card of a folder may be written: there is none, or this program wrote it."""
    file = folder / CARD_FILE
    return not file.exists() or MARK in file.read_text(encoding="utf-8", errors="replace")


def write(folder: Path, spec: PipelineSpec, facts: Facts | None = None, repository: str | None = None) -> None:
    """Write a folder's model card, unless there is one that a person wrote.

    Args:
        folder: Folder of a pipeline, a model or adapters.
        spec: The pipeline.
        facts: What is known of the training; None for nothing.
        repository: Where the folder is on the Hub; None where it is not there.
    """
    if is_ours(folder):
        write_text(folder / CARD_FILE, _text(folder, spec, facts, repository))


def _text(folder: Path, spec: PipelineSpec, facts: Facts | None, repository: str | None) -> str:
    head = yaml.safe_dump(_head(folder, spec, facts), sort_keys=False, allow_unicode=True, width=1000)
    parts = [f"# {facts.title if facts else folder.resolve().name}", MARK]
    if facts is not None:
        parts.append(_described(spec, facts))
        if facts.grid is not None:
            parts.append(f"![Samples]({facts.grid})")
    drawing = spec.family.card(spec) or _drawing(folder, spec, facts, repository or "FOLDER")
    if drawing:
        parts.append(drawing.strip())
    if facts is not None:
        parts += _sections(facts)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def _head(folder: Path, spec: PipelineSpec, facts: Facts | None) -> dict[str, Any]:
    """Return the metadata that the Hub reads."""
    prompted = bool(spec.tokenizers)
    head: dict[str, Any] = {"library_name": "diffusers"}
    if spec.autoencoder_loss is None:
        head["pipeline_tag"] = "text-to-image" if prompted else "unconditional-image-generation"
    tags = ["diffusers", spec.kind]
    if facts is not None:
        tags += facts.tags
        if facts.base is not None and _on_hub(facts.base):
            head["base_model"] = facts.base
        if (license_ := _license(facts.base)) is not None:
            head["license"] = license_
        if facts.dataset is not None and _on_hub(facts.dataset):
            head["datasets"] = [facts.dataset]
        instance = next((texts[0] for option, texts in facts.prompts.items() if "instance_prompt" in option), None)
        if instance:
            head["instance_prompt"] = instance
    tags += _adapters(folder, spec)
    if spec.classes:
        tags.append("class-conditional")
    if spec.autoencoder_loss is None and spec.objective.name != "ddpm":
        tags.append(spec.objective.name.replace("_", "-"))
    return head | {"tags": list(dict.fromkeys(tags))}


def _adapters(folder: Path, spec: PipelineSpec) -> dict[str, str]:
    """Return the files of adapters in a folder, by kind."""
    files, parts = file_names(spec.adapters_name), spec.components.values()
    kinds = {"lora": files.lora, "textual_inversion": files.embeddings}
    if spec.adapters_name is not None:  # by which a LoRA and a word have one name
        kinds.pop("lora" if any(part.new_tokens is not None for part in parts) else "textual_inversion")
    return {kind: file for kind, file in kinds.items() if (folder / file).exists()}


def _on_hub(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not as_path(name).exists()


def _license(base: str | None) -> str | None:
    """Return the licence of the model that a run started from, where it is known; of a folder its card says it."""
    if base is None:
        return None
    card = as_path(base) / CARD_FILE
    if card.is_file() and (found := _FRONT.match(card.read_text(encoding="utf-8", errors="replace"))):
        said = re.search(r"^license:\s*([\w.+-]+)\s*$", found[1], re.MULTILINE)
        return said[1] if said else None
    return next((license_ for start, license_ in _LICENSES.items() if base.startswith(start)), None)


def _described(spec: PipelineSpec, facts: Facts) -> str:
    if facts.base is None:
        base = "from scratch"
    else:
        base = f"from [{facts.base}](https://huggingface.co/{facts.base})" if _on_hub(facts.base) else "from a model"
    data = ""
    if facts.dataset is not None:
        on_hub = _on_hub(facts.dataset)
        link = f"[{facts.dataset}](https://huggingface.co/datasets/{facts.dataset})" if on_hub else f"`{facts.dataset}`"
        data = f" on {link}"
    steps = "" if facts.step is None else f" for {facts.step} steps"
    return f"{spec.kind}, {facts.made} {base}{data}{steps} by flax_diffusion."


def _drawing(folder: Path, spec: PipelineSpec, facts: Facts | None, name: str) -> str | None:
    """Return how Diffusers opens what lies in the folder; None for what no one call opens."""
    base = facts.base if facts is not None and facts.base is not None and _on_hub(facts.base) else "BASE_MODEL"
    if (folder / "model_index.json").exists():
        lines = [f'pipeline = DiffusionPipeline.from_pretrained("{name}")']
    elif found := _adapters(folder, spec):
        lines = [f'pipeline = DiffusionPipeline.from_pretrained("{base}")']
        for kind, file in found.items():
            own = "" if file in FileNames() else f', weight_name="{file}"'
            lines.append(f'pipeline.{_LOADS[kind]}("{name}"{own})')
    else:
        return None
    return "\n".join(["## How to draw", "", "```python", "from diffusers import DiffusionPipeline", "", *lines, "```"])


def _sections(facts: Facts) -> list[str]:
    """Return the sections of prompts, of what was measured, and of the command."""
    parts = []
    shown = [(option, texts) for option, texts in facts.prompts.items() if texts and option != "prompt_templates"]
    if shown:
        lines = [f"- `{option}`: {', '.join(f'“{_line(text)}”' for text in texts)}" for option, texts in shown]
        parts.append("## Prompts\n\n" + "\n".join(lines))
    if facts.metrics:
        rows = [f"| {name} | {value:.6g} |" for name, value in facts.metrics.items() if isinstance(value, int | float)]
        parts.append("## Measured\n\n| what | value |\n|---|---|\n" + "\n".join(rows))
    if facts.command:
        parts.append(f"## Command\n\n```bash\n{SECRET.sub('…', facts.command)}\n```")
    return parts


def _line(text: str) -> str:
    return " ".join(text.split())
