"""Defaults that a task changes, without a word about what the options are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)


def with_defaults(**values: Any) -> Callable[[type[Model]], type[Model]]:
    """Return a class decorator that gives inherited options other defaults.

    Args:
        values: Option to default; type, rule and description stay those of the class that has the option.
    """

    def changed(model: type[Model]) -> type[Model]:
        for name, value in values.items():
            field = copy.copy(model.model_fields[name])
            field.default = value
            model.model_fields[name] = field
        model.model_rebuild(force=True)
        return model

    return changed
