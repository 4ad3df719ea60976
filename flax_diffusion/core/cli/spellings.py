"""Spellings of options, their values in files, and the errors for wrong ones."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flax_diffusion.core.errors import ConfigError, nearest, shown
from flax_diffusion.core.tasks.task import TASKS

Given = Mapping[str, tuple[str, str]]
"""Spelling and origin of each given option, by field. The origin is a file's name or "command line"."""


def spellings(name: str, field: FieldInfo) -> list[str]:
    """Return all spellings of a config field, its own name first."""
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else [name]


def fields_by_spelling(model: type[BaseModel]) -> dict[str, str]:
    """Return the fields of a config class by each of their spellings."""
    return {spelling: name for name, field in model.model_fields.items() for spelling in spellings(name, field)}


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type of any other annotation."""
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return get_args(annotation)
    return (annotation,)


def in_file(value: Any, written: Any, annotation: Any) -> Any:
    """Return a value of a YAML file such that a word means the same there as on the command line.

    YAML reads `no` as False, `7` as a number and `2024-01-01` as a date, where an option may take a text. So scalars
    are taken as they are written, and a single scalar may stand for a list. The values of a model's config stay as YAML
    reads them.

    Args:
        value: The value as YAML reads it.
        written: The same value, with scalars as they are written.
        annotation: The option's type.
    """
    members = union_members(annotation)
    items = next((get_args(member)[0] for member in members if get_origin(member) is list), None)
    if items is not None and written is not None:
        pairs = zip(value, written, strict=True) if isinstance(value, list) else [(value, written)]
        return [in_file(one, word, items) for one, word in pairs]
    if isinstance(value, dict) and isinstance(written, dict):
        inner = next((member for member in members if _is_model(member)), None)
        if inner is None or value.keys() != written.keys():
            return value
        kinds = {name: field.annotation for name, field in inner.model_fields.items()}
        return {name: in_file(one, written[name], kinds.get(name)) for name, one in value.items()}
    optional_number = type(None) in members and str not in members
    if optional_number and isinstance(written, str) and written.lower() == "none":
        return None
    return value if isinstance(value, list) else written


def _is_model(annotation: Any) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


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


def invalid(error: ValidationError, model: type[BaseModel], origin: str, given: Given) -> ConfigError:
    """Return the error for pydantic's report: one line with the spelling, the rule and the value of each wrong option.

    Args:
        error: The report.
        model: The config class.
        origin: Where the values come from, for rules between options.
        given: The spelling and the origin of each given option.
    """
    fields = fields_by_spelling(model)
    by_place: dict[tuple[Any, ...], list[Any]] = {}
    for item in error.errors():
        _, *inside = item["loc"] or ("",)
        in_list = inside and isinstance(inside[0], int)  # else it is the type that pydantic tried
        by_place.setdefault(item["loc"] if in_list else item["loc"][:1], []).append(item)
    says = [_describe(place, items, model) for place, items in by_place.items()]
    places = {
        given[fields[str(place[0])]][1] if place and fields.get(str(place[0])) in given else origin
        for place in by_place
    }
    text = "; ".join(says)
    for name, (spelling, _) in given.items():
        text = re.sub(rf"--{name}\b", f"--{spelling}", text)
    return ConfigError(f"{places.pop() if len(places) == 1 else origin}: {text}")


def _describe(place: tuple[Any, ...], items: Sequence[Any], model: type[BaseModel]) -> str:
    """Describe what is wrong with the value at one place, from the reports of all types that it may have."""
    first = items[0]
    text = first["msg"].removeprefix("Value error, ")
    if not place:
        return text
    field = model.model_fields[fields_by_spelling(model)[str(place[0])]]
    option = f"--{'.'.join(map(str, (fields_by_spelling(model)[str(place[0])], *place[1:])))}"
    if first["type"] == "missing":
        return f"{option} is required: give it" + ("" if place[1:] else " (--help says what it is)")
    if first["type"] == "extra_forbidden":
        known = [name for inner in _models_in(field.annotation) for name in inner.model_fields]
        return f"{option}: there is no such option{nearest(place[-1], known)}; there are {', '.join(known)}"
    rules = list(dict.fromkeys(_rule(item) for item in items))
    if not place[1:] and type(None) in union_members(field.annotation):
        rules.append("null")
    if any(item["type"] == "value_error" for item in items):
        return f"{option}: {text}, got {shown(first['input'])}"
    choices = [choice for item in items if item["type"] == "literal_error" for choice in _choices(item)]
    hint = nearest(str(first["input"]).lower(), choices)
    got = "nothing (null)" if first["input"] is None else shown(first["input"])
    return f"{option}: must be {', or '.join(rules)}, got {got}{hint}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_model(annotation):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _choices(item: Any) -> list[str]:
    return re.findall(r"'([^']*)'", item["ctx"]["expected"])


_KINDS = {
    "a whole number": ("int_parsing", "int_type", "int_from_float", "int_parsing_size"),
    "a number": ("float_parsing", "float_type"),
    "true or false": ("bool_parsing", "bool_type"),
    "text": ("string_type",),
    "a list": ("list_type",),
    "a mapping": ("dict_type", "model_type"),
}
_RULES: dict[str, Callable[[Any], str]] = {
    "greater_than": lambda context: f"greater than {context['gt']:g}",
    "greater_than_equal": lambda context: f"at least {context['ge']:g}",
    "less_than": lambda context: f"less than {context['lt']:g}",
    "less_than_equal": lambda context: f"at most {context['le']:g}",
    "literal_error": lambda context: context["expected"],
}


def _rule(item: Any) -> str:
    """Describe what the value must be."""
    kind = item["type"]
    if kind in _RULES:
        return _RULES[kind](item["ctx"])
    text = item["msg"].removeprefix("Input should be ")
    return next((words for words, kinds in _KINDS.items() if kind in kinds), text[:1].lower() + text[1:])


def option_words(model: type[BaseModel], values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that give options, without those that have their defaults.

    Args:
        model: The config class.
        values: Values by field name, as plain data.
    """
    words: list[str] = []
    for name, value in values.items():
        default = model.model_fields[name].get_default(call_default_factory=True)
        if value != (default.model_dump(mode="json") if isinstance(default, BaseModel) else default):
            words += _option(name, value)
    return words


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    words = [_word(one) for one in (value if isinstance(value, list) else [value])]
    if any(word.startswith("-") for word in words):  # which the parser would take for options
        return [f"--{name}={word}" for word in words]
    return [f"--{name}", *words]


def _word(value: Any) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value)
    return "null" if value is None else str(value)
