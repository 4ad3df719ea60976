"""Values of strangers' configs against the types that our classes declare for them."""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from flax_diffusion.core.errors import ConfigError, nearest, shown

Size = Annotated[int, Field(gt=0, le=2**20)]
"""Channels, features, pixels, timesteps."""
Count = Annotated[int, Field(ge=0, le=2**8)]
"""Layers: as many as are looped over."""
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
Checkpointing = bool | Literal["minimal"]
"""What the backward pass computes again: nothing, whole blocks, or all but their products and convolutions."""


def check_values(owner: type, values: Mapping[str, Any], name: str | None = None) -> None:
    """Compares values with the annotations of a class, strictly: an integer will do for a float, and that is all.

    Args:
        owner: Has the annotations.
        values: By field; those of fields without an annotation are not looked at.
        name: What the message calls the owner; by default its own name.

    Raises:
        ConfigError: Naming the first that does not fit.
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
    """The texts that a type names."""
    if typing.get_origin(hint) is Literal:
        return map(str, typing.get_args(hint))
    return (choice for inner in typing.get_args(hint) for choice in _choices(inner))
