"""Merging of LoRA files, new words or a training checkpoint into a pipeline as it is opened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.checkpoints.folders import require_whole
from flax_diffusion.core.checkpoints.portable import Arrays
from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.spec.adapters import NEW_ROWS, KohyaNames, LoraLayer, Overlay, trained_layers
from flax_diffusion.core.spec.lora_files import LORA_FILES, Layers, read_lora_layers
from flax_diffusion.core.spec.new_words import add_word, read_words
from flax_diffusion.core.spec.pipeline import PipelineSpec

Shapes = Callable[[PipelineSpec], Layers]
"""Function that returns the shapes of a pipeline's parameters by component and PyTorch name. It reads no weights."""


def with_adapters(
    spec: PipelineSpec, shapes: Shapes, lora: Iterable[str], lora_scale: float, embeddings: Iterable[str]
) -> PipelineSpec:
    """Add LoRA and new words to a pipeline.

    Args:
        spec: The pipeline; the words are added to its tokenizer.
        shapes: Gives the shapes of the pipeline's parameters.
        lora: LoRA files or folders, each as PATH or PATH:STRENGTH.
        lora_scale: Strength of all LoRA files, which multiplies each one's own.
        embeddings: Files or folders of textual inversion, each as PATH or PATH:WORD.

    Returns:
        The pipeline, whose components hold the differences from their files.

    Raises:
        UserError: If one does not exist, or does not fit.
    """
    known = shapes(spec) if lora else {}
    for item in lora:
        layers, strength = read_lora(item, known, spec.kohya_names)
        spec = _with_lora(spec, layers, strength * lora_scale)
    for item in embeddings:
        path, word = _path_and_rest(item)
        spec = _with_words(spec, path, word)
    return spec


def read_lora(item: str, known: Layers, kohya: KohyaNames) -> tuple[dict[str, dict[str, LoraLayer]], float]:
    """Read a LoRA.

    Args:
        item: The LoRA's file or folder, as PATH or PATH:STRENGTH.
        known: Shapes of the pipeline's parameters, by component and PyTorch name.
        kohya: Kohya's names of the layers.

    Returns:
        Its matrices by component and layer name, and its strength.

    Raises:
        UserError: If it does not exist, or does not fit.
    """
    path, strength = _path_and_strength(item)
    return read_lora_layers(path, known, kohya), strength


def header_of(item: str, spec: PipelineSpec, form: str) -> dict[str, str]:
    """Return what the file of a LoRA says of itself, for a copy of it in another form; its alphas may change.

    Args:
        item: The LoRA's file or folder, as PATH or PATH:STRENGTH.
        spec: The pipeline of its base model.
        form: Names in the copy: "peft" or "kohya".
    """
    file = model_files.weights_file(_path_and_strength(item)[0], "--lora", LORA_FILES)
    header = {
        key: text
        for key, text in model_files.safetensors_metadata(file).items()
        if key.startswith(("modelspec.", "ss_")) and key != "ss_network_alpha"
    }
    if "modelspec.implementation" in header:
        header["modelspec.implementation"] = implementation(spec, form)
    return header


def implementation(spec: PipelineSpec, form: str) -> str:
    """Return the `modelspec.implementation` of a LoRA file: where the names of its layers come from.

    Args:
        spec: The pipeline of its base model.
        form: Names in it: "peft" or "kohya".
    """
    return spec.family.lora_base(spec).original if form == "kohya" else "diffusers"


def _path_and_rest(item: str) -> tuple[Path, str | None]:
    """Split an item into a path and what follows its last colon; None for nothing."""
    head, colon, rest = item.rpartition(":")
    if not colon or rest.startswith("//") or as_path(item).exists():
        return as_path(item), None
    return as_path(head), rest


def _path_and_strength(item: str) -> tuple[Path, float]:
    path, rest = _path_and_rest(item)
    if rest is None:
        return path, 1.0
    try:
        strength = float(rest)
    except ValueError:
        return as_path(item), 1.0
    if not math.isfinite(strength):
        raise ConfigError(f"--lora {item}: the strength must be a finite number, such as {path}:0.8")
    return path, strength


def _overlaid(spec: PipelineSpec, name: str, overlay: Overlay, **config: int) -> PipelineSpec:
    component = spec.components[name]
    component = replace(component, overlay=overlay, config=component.config | config)
    return replace(spec, components=spec.components | {name: component})


def _with_lora(spec: PipelineSpec, found: Mapping[str, Mapping[str, LoraLayer]], strength: float) -> PipelineSpec:
    for name, layers in found.items():
        overlay = spec.components[name].overlay or Overlay()
        spec = _overlaid(spec, name, replace(overlay, loras=(*overlay.loras, (layers, strength))))
    return spec


def _with_words(spec: PipelineSpec, path: Path, word: str | None) -> PipelineSpec:
    if not spec.encoder_tokenizers:
        raise WeightsError(f"{path}: a {spec.kind} takes no prompts, so no new words")
    for name, own in read_words(path, [*spec.encoder_tokenizers], spec.family.word_keys, word).items():
        for encoder, rows in own.items():
            features = spec.components[encoder]["hidden_size"]
            if rows.shape[1] != features:
                raise WeightsError(
                    f"{path}: '{name}' has {rows.shape[1]} features, this text encoder {features}: it was learnt for "
                    "another model"
                )
        for encoder, rows in own.items():
            tokenizer = spec.encoder_tokenizers[encoder]
            first, _ = add_word(tokenizer, name, len(rows), f"--embeddings {path}:", "name another, PATH:WORD")
            spec = _with_rows(spec, encoder, rows, first)
    return spec


def _with_rows(spec: PipelineSpec, name: str, rows: np.ndarray, first: int) -> PipelineSpec:
    """Append the rows of new words to those of a text encoder's table, or of earlier new words."""
    overlay = spec.components[name].overlay or Overlay()
    if overlay.rows is not None:
        rows, first = np.concatenate([overlay.rows, rows]), overlay.first
    return _overlaid(spec, name, replace(overlay, rows=rows, first=first), vocab_size=first + len(rows))


def with_learnt_word(spec: PipelineSpec, file: Path) -> PipelineSpec:
    """Put the rows that a run of textual inversion has written into the pipeline that it trained.

    Args:
        spec: The pipeline.
        file: The file in the run's folder.

    Returns:
        The pipeline with the rows.

    Raises:
        WeightsError: If they are of another word, or of another number of tokens.
    """
    learnt = {name: part.new_tokens for name, part in spec.components.items() if part.new_tokens is not None}
    new = next(iter(learnt.values()))
    words = read_words(file, [*learnt], spec.family.word_keys)
    counts = {word: {len(rows) for rows in own.values()} for word, own in words.items()}
    if counts != {new.placeholder: {len(new.tokens)}}:
        held = ", ".join(f"{word} of {' and '.join(map(str, sorted(count)))}" for word, count in counts.items())
        raise WeightsError(
            f"{file.parent}: its config.yaml says the word {new.placeholder} of {len(new.tokens)} vectors, and its "
            f"file has {held}: give the model by --model and the file by --embeddings"
        )
    for name, rows in words[new.placeholder].items():
        spec = _with_rows(spec, name, rows, learnt[name].first)
    return spec


def checkpoint_arrays(folder: Path) -> dict[str, Arrays]:
    """Read the trained weights of a checkpoint of either backend, or their main average if it has any.

    Args:
        folder: The checkpoint.

    Returns:
        Arrays by component and PyTorch name.

    Raises:
        CheckpointError: If the folder is no checkpoint, or its files have changed since they were written.
    """
    require_whole(folder)
    arrays, metadata = portable.read(folder)
    kinds = {name.partition("/")[0] for name in arrays}
    kind = next((average for average in metadata.get("averages", ["ema"]) if average in kinds), "params")
    found: dict[str, Arrays] = {}
    for name, array in arrays.items():
        if name.startswith(f"{kind}/"):
            _, component, inside = name.split("/", 2)
            found.setdefault(component, {})[inside] = array
    return found


def with_checkpoint(spec: PipelineSpec, folder: Path) -> PipelineSpec:
    """Put the trained weights of a checkpoint into the pipeline that was trained.

    Args:
        spec: The pipeline, which says what trains.
        folder: The checkpoint.

    Returns:
        The pipeline with these weights.

    Raises:
        CheckpointError: If the folder is no checkpoint, or its files have changed since they were written.
        WeightsError: If the checkpoint holds a model that the pipeline does not train.
    """
    for name, arrays in checkpoint_arrays(folder).items():
        component = spec.components.get(name)
        if component is None or not component.is_trained:
            raise WeightsError(f"{folder} trained a {name}, and the config.yaml of its run does not: use its own")
        if component.lora is not None:
            spec = _with_lora(spec, {name: trained_layers(component.lora, arrays)}, 1.0)
        elif component.new_tokens is not None:
            spec = _with_rows(spec, name, arrays[NEW_ROWS], component.new_tokens.first)
        else:
            spec = _overlaid(spec, name, replace(component.overlay or Overlay(), replaced=arrays))
    return spec
