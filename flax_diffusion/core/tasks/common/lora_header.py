"""What a LoRA file says of itself in its header, for the programs that list such files.

`modelspec.` keys are those of https://github.com/Stability-AI/ModelSpec 1.0.1, and `ss_` keys those of kohya's
sd-scripts. All values are texts. No key holds a time or a path, so that the same run writes the same file.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.spec.merging import implementation
from flax_diffusion.core.spec.pipeline import PipelineSpec

_OPTIONS = {
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_learning_rate": "learning_rate",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_train_steps": "max_train_steps",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_mixed_precision": "mixed_precision",
    "ss_network_alpha": "lora_alpha",
    "ss_network_dim": "lora_rank",
    "ss_noise_offset": "noise_offset",
    "ss_seed": "seed",
    "ss_text_encoder_lr": "text_encoder_learning_rate",
}
"""Kohya's keys, and the options of a run that they hold."""

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def lora_header(config: TrainConfig, spec: PipelineSpec, pictures: int, form: str) -> dict[str, str]:
    """Return the header's entries for a run.

    Args:
        config: Options of the run.
        spec: The pipeline.
        pictures: Number of the pictures that the run trains on.
        form: Names in the file: "peft" or "kohya".
    """
    side, title = spec.resolution, spec.adapters_name or as_path(config.output_dir).name
    base = spec.family.lora_base(spec)
    header = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": implementation(spec, form),
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "ss_base_model_version": base.version,
        "ss_network_module": "networks.lora",
        "ss_num_train_images": str(pictures),
        "ss_output_name": title,
        "ss_resolution": f"({side}, {side})",
        "ss_sd_model_name": _model_name(str(config.pretrained_model_name_or_path)),
    }
    predicted = spec.scheduler.get("prediction_type", "epsilon")
    if predicted in _PREDICTIONS and spec.objective.name == "ddpm":
        header["modelspec.prediction_type"] = _PREDICTIONS[predicted]
    if prompts := Counter(concept.instance_prompt for concept in getattr(config, "all_concepts", [])):
        header["modelspec.trigger_phrase"] = ", ".join(prompts)
        header["ss_tag_frequency"] = json.dumps({title: prompts})
    values: dict[str, Any] = {key: getattr(config, option, None) for key, option in _OPTIONS.items()}
    values["ss_network_alpha"] = float(values["ss_network_alpha"] or values["ss_network_dim"])
    return header | {key: str(value) for key, value in values.items() if value is not None}


def _model_name(model: str) -> str:
    """Return a Hub id, or the name of a folder without where it lies."""
    return Path(model).resolve().name if as_path(model).exists() else model
