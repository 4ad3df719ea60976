"""Writing of the files of a pipeline folder that belong to no model, and of adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.io.files import write_json, written_folder
from flax_diffusion.core.spec import adapters
from flax_diffusion.core.spec.pipeline import PipelineSpec


def write_index(spec: PipelineSpec, folder: Path) -> None:
    """Write the files of a pipeline folder that belong to no model: model_index.json, scheduler and tokenizers.

    Args:
        spec: The pipeline.
        folder: Folder of the pipeline.
    """
    listed, pipelines = spec.listed_as or spec.kind, spec.family.pipelines
    index: dict[str, Any] = {"_class_name": listed}
    index |= {name: [component.model.library, component.kind] for name, component in spec.components.items()}
    index["scheduler"] = ["diffusers", spec.scheduler["_class_name"].removeprefix("Flax")]
    index |= {name: ["transformers", "CLIPTokenizer"] for name in spec.tokenizers}
    save_tokenizers(spec, folder)
    known = pipelines.get(listed, pipelines[spec.kind])
    index = {**known.index, **known.settings, **spec.settings, **index}
    scheduler = spec.scheduler | {"_class_name": index["scheduler"][1]}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def save_tokenizers(spec: PipelineSpec, folder: Path) -> None:
    """Write the tokenizers, if there are any; a resumed run reads them from there.

    Args:
        spec: The pipeline.
        folder: Folder of the pipeline.
    """
    for name, tokenizer in spec.tokenizers.items():
        with written_folder(folder / name) as local:
            tokenizer.save_pretrained(local)


def write_adapters(spec: PipelineSpec, trained: Mapping[str, np.ndarray], folder: Path, form: str) -> None:
    """Write trained adapters to pytorch_lora_weights.safetensors or learned_embeds.safetensors.

    Args:
        spec: The pipeline, which says what was trained.
        trained: Arrays by component and PyTorch name, such as `unet/….lora_A.weight`.
        folder: Folder to write to.
        form: Names in a LoRA file: "peft" or "kohya".
    """
    loras, words = {}, {}
    for name, component in spec.components.items():
        own = {key.removeprefix(f"{name}/"): array for key, array in trained.items() if key.startswith(f"{name}/")}
        own = {key: np.asarray(array, np.float32) for key, array in own.items()}
        if component.lora is not None:
            loras[name] = adapters.trained_layers(component.lora, own)
        if component.new_tokens is not None:
            words.setdefault(component.new_tokens.placeholder, {})[name] = own[adapters.NEW_ROWS]
    for word, rows in words.items():
        adapters.save_embeddings(folder / adapters.EMBEDDINGS_FILE, word, rows, spec.family.word_keys)
    if loras:
        adapters.save_lora(folder / adapters.LORA_FILE, loras, form, spec.kohya_names)
