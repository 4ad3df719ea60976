"""Options that there are not, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from flax_diffusion.core.config.spellings import fields_by_spelling
from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.tasks.task import TASKS

_ANY_FORMAT = "drop it, weights are read whether PyTorch or Flax wrote them"
_PROFILE = "drop it; `python -m tpu.plan` shows time and memory of a step, and --profile_steps 10:15 records some"
_PRODIGY = "drop it; the optimizers are those of --optimizer, and Prodigy is not one of them"
_CORNER = "drop it; the model is told the corner where each picture is really cut"
REPLACED = {
    "from_pt": _ANY_FORMAT,
    "controlnet_from_pt": _ANY_FORMAT,
    "profile_validation": _PROFILE,
    "profile_memory": _PROFILE,
    "ccache": "set the environment variable JAX_COMPILATION_CACHE_DIR to that folder",
    "logging_steps": "drop it, every step is logged",
    "wandb_entity": "set the environment variable WANDB_ENTITY to it",
    "streaming": "drop it; data are downloaded once, so that each epoch has an order, which a resumed run keeps",
    "load_from_disk": "drop it, and write the dataset to a folder by its `to_parquet`, which --train_data_dir opens",
    "debug_loss": "drop it; the loss of each step is in TensorBoard's files",
    "enable_npu_flash_attention": "drop it; attention runs in the best kernel that the device has",
    "adam_weight_decay_text_encoder": "drop it; --adam_weight_decay is that of all models",
    "decoder_only": "drop it; an autoencoder trains as a whole",
    "do_edm_style_training": "give --objective edm",
    "output_kohya_format": "give --lora_format kohya",
    "prior_generation_precision": "drop it; the class's pictures are drawn in --mixed_precision",
    "prodigy_beta3": _PRODIGY,
    "prodigy_decouple": _PRODIGY,
    "prodigy_use_bias_correction": _PRODIGY,
    "prodigy_safeguard_warmup": _PRODIGY,
    "use_dora": "drop it; only plain LoRA trains here, by --lora_rank",
    "save_as_full_pipeline": "drop it; `python -m flax_diffusion.convert --model MODEL --embeddings RUN` writes it",
    "save_steps": "give --checkpointing_steps; the word is written to each checkpoint",
    "crops_coords_top_left_h": _CORNER,
    "crops_coords_top_left_w": _CORNER,
    "local_rank": "drop it; the launcher tells each process its place",
}
"""Options of Diffusers' scripts that there are not here, and what to do instead."""

_FOLDERS = ("instance_data_dir", "train_data_dir")
"""Names that tasks give to the folder of pictures; no task has both."""


def unknown_option(name: str, model: type[BaseModel] | None, known: Iterable[str], origin: str) -> ConfigError:
    """Return the error for an unknown option, which names the tasks that have it, or the nearest known option.

    Args:
        name: The unknown name, with or without dashes.
        model: The config class; None where there is none.
        known: The known names, with or without dashes like `name`.
        origin: Where the name was given.
    """
    word = name.removeprefix("--")
    positive = word.removeprefix("no_")
    dashes = name[: len(name) - len(word)]
    start = f"{origin}: unknown option '{name}'"
    if positive in REPLACED:
        return ConfigError(f"{start}: {REPLACED[positive]}")
    task = next((name for name, task in TASKS.items() if task.config_class is model), None)
    owners = [name for name, other in TASKS.items() if {word, positive} & fields_by_spelling(other.config_class).keys()]
    if task is None or not owners:
        return ConfigError(start + (nearest(name, known) or "; --help lists those there are"))
    of_others = f"{start}: {_and(owners)} {'has' if len(owners) == 1 else 'have'} it, {task} has not"
    here = next(
        (folder for folder in _FOLDERS if word in _FOLDERS and folder in TASKS[task].config_class.model_fields), None
    )
    return ConfigError(f"{of_others}; {'drop it' if here is None else f'give {dashes}{here}'}")


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
