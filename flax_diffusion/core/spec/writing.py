"""Writing of the files of a pipeline folder that belong to no model, and of adapters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.families.folders import CLASS_NAMES
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import absolute, copy_file, is_local, walk, write_json, written_folder
from flax_diffusion.core.spec import adapters, cards
from flax_diffusion.core.spec.pipeline import PipelineSpec

CLASSES_FILE = "classes.json"
"""File in a run's folder with the names of its classes by number."""
_INDEX = "model_index.json"


def write_index(spec: PipelineSpec, folder: Path) -> None:
    """Write the files of a pipeline folder that belong to no model: model_index.json, scheduler, tokenizers, card.

    Args:
        spec: The pipeline.
        folder: Folder of the pipeline.
    """
    listed, pipelines = spec.listed_as or spec.kind, spec.family.pipelines
    index: dict[str, Any] = {"_class_name": listed}
    index |= {name: [component.model.library, component.kind] for name, component in spec.components.items()}
    index["scheduler"] = ["diffusers", spec.scheduler["_class_name"].removeprefix("Flax")]
    index |= {name: ["transformers", "CLIPTokenizer"] for name in spec.tokenizers}
    _save_tokenizers(spec, folder)
    known = pipelines.get(listed, pipelines[spec.kind])
    index = {**known.index, **known.settings, **spec.settings, **index}
    if spec.classes:
        index[CLASS_NAMES] = _numbered(spec.classes)
    scheduler = spec.scheduler | {"_class_name": index["scheduler"][1]}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / _INDEX, index)
    if spec.family.card(spec) is not None and not (folder / cards.CARD_FILE).exists():
        cards.write(folder, spec)


def complete(folder: Path, pipeline: Path) -> None:
    """Make a pipeline folder of one that holds other weights of some parts of a pipeline, if that is one itself.

    Args:
        folder: Folder with the parts that differ, one subfolder each.
        pipeline: Folder of the pipeline. To its other parts the new folder has links that hold while both folders are
            moved together; object stores get copies.
    """
    if not (pipeline / _INDEX).is_file():
        return
    for name in model_files.read_json(pipeline / _INDEX):
        part, target = pipeline / name, folder / name
        if part.is_dir() and not target.exists():
            _link(part, target)
    copy_file(pipeline / _INDEX, folder / _INDEX)


def _link(part: Path, target: Path) -> None:
    """Link a folder, or copy it where there are no links: in object stores, and on some file systems."""
    if is_local(part) and is_local(target):
        target.unlink(missing_ok=True)  # a link to what is not there any more
        try:
            target.symlink_to(os.path.relpath(absolute(part), absolute(target.parent)), target_is_directory=True)
        except OSError:
            shutil.copytree(part, target)
        return
    for name in walk(part):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(part / name, target / name)


def save_vocabulary(spec: PipelineSpec, run: Path) -> None:
    """Write what makes a run's checkpoints readable beside its options: the tokenizers, and the names of classes.

    Args:
        spec: The pipeline.
        run: Folder of the run.
    """
    _save_tokenizers(spec, run)
    if spec.classes:
        write_json(run / CLASSES_FILE, _numbered(spec.classes))


def read_classes(run: Path) -> tuple[str, ...]:
    """Read the names of classes that `save_vocabulary` wrote.

    Args:
        run: Folder of the run.

    Raises:
        WeightsError: If they are not there.
    """
    names = model_files.read_json(run / CLASSES_FILE)
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _save_tokenizers(spec: PipelineSpec, folder: Path) -> None:
    for name, tokenizer in spec.tokenizers.items():
        with written_folder(folder / name) as local:
            tokenizer.save_pretrained(local)


def _numbered(classes: Sequence[str]) -> dict[str, str]:
    return {str(number): name for number, name in enumerate(classes)}


def write_adapters(
    spec: PipelineSpec, trained: Mapping[str, np.ndarray], folder: Path, form: str, header: Mapping[str, str]
) -> None:
    """Write trained adapters to the files of `adapters.file_names`.

    Args:
        spec: The pipeline, which says what was trained.
        trained: Arrays by component and PyTorch name, such as `unet/….lora_A.weight`.
        folder: Folder to write to.
        form: Names in a LoRA file: "peft" or "kohya".
        header: What a LoRA file says of itself.
    """
    loras, words, files = {}, {}, adapters.file_names(spec.adapters_name)
    for name, component in spec.components.items():
        own = {key.removeprefix(f"{name}/"): array for key, array in trained.items() if key.startswith(f"{name}/")}
        own = {key: np.asarray(array, np.float32) for key, array in own.items()}
        if component.lora is not None:
            loras[name] = adapters.trained_layers(component.lora, own)
        if component.new_tokens is not None:
            words.setdefault(component.new_tokens.placeholder, {})[name] = own[adapters.NEW_ROWS]
    for word, rows in words.items():
        adapters.save_embeddings(folder / files.embeddings, word, rows, spec.family.word_keys)
    if loras:
        adapters.save_lora(folder / files.lora, loras, form, spec.kohya_names, header)
