"""Spellings of options, their values in files, and the errors for wrong ones."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

from flax_diffusion.core.errors import ConfigError, nearest, shown

M = TypeVar("M", bound=BaseModel)

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


def checked(model: type[M], values: Mapping[str, Any], origin: str, given: Given | None = None) -> M:
    """Make a config of values whose names are known, or turn pydantic's report into an error of one line.

    Args:
        model: The config class.
        values: Values by field name or alias.
        origin: Where the values come from, for the message: a file name or "command line".
        given: The spelling and the origin of single options; None if they are as in `values`.

    Raises:
        ConfigError: For wrong types or values, and rules between fields.
    """
    try:
        return model(**values)
    except ValidationError as error:
        known = fields_by_spelling(model)
        given = {known[name]: (name, origin) for name in values} if given is None else given
        raise invalid(error, model, origin, given) from error


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
