"""Checks of values in other people's configs against the types that our classes declare for them."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flax_diffusion.core.errors import ConfigError, nearest, shown

Size = Annotated[int, Field(gt=0, le=2**20)]
"""A number of channels, features, pixels or timesteps."""
Count = Annotated[int, Field(ge=0, le=2**8)]
"""A number of layers. The bound is low because the code loops over them."""
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
Checkpointing = bool | Literal["minimal"]
"""What the backward pass computes again: nothing (False), whole blocks (True), or everything in them except matrix
products and convolutions ("minimal")."""


def check_values(owner: type, values: Mapping[str, Any], name: str | None = None) -> None:
    """Check values against the annotations of a class, strictly: only an integer may stand for a float.

    Args:
        owner: The class that has the annotations.
        values: Values by field name; fields without an annotation are ignored.
        name: What the message calls the owner; by default the name of the class.

    Raises:
        ConfigError: If a value does not fit; the message names the first such value.
    """
    for field, hint in _hints(owner).items():
        if field not in values:
            continue
        value = values[field]
        try:
            _type_of(owner, field).validate_python(value)
        except ValidationError as error:
            rules = dict.fromkeys(item["msg"].removeprefix("Input should be ") for item in error.errors())
            raise ConfigError(
                f"{name or owner.__name__}: {field} is {shown(value)}; it must be {', or '.join(rules)}"
                f"{nearest(value, _choices(hint))}"
            ) from error


@functools.cache
def _type_of(owner: type, field: str) -> TypeAdapter[Any]:
    return TypeAdapter(_hints(owner)[field], config=ConfigDict(strict=True))


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)


def _choices(hint: Any) -> Iterable[str]:
    """Yield the texts that the `Literal`s in a type allow."""
    if typing.get_origin(hint) is Literal:
        return map(str, typing.get_args(hint))
    return (choice for inner in typing.get_args(hint) for choice in _choices(inner))
