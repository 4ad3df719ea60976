"""The option that says which steps are recorded."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _checked(steps: str | None) -> str | None:
    known = re.fullmatch(r"\d{1,9}(:\d{1,9})?", steps or "0", re.ASCII)
    asked = profile_range(steps) if known else (0, 0)
    if asked is not None and not 1 <= asked[0] <= asked[1]:
        raise ValueError("write the first and last step, such as 10:15")
    return steps


def profile_range(steps: str | None) -> tuple[int, int] | None:
    """Return the first and last of the steps that are recorded; None for none.

    Args:
        steps: Value of --profile_steps. A number alone is that of the steps after the first, which compiles.
    """
    first, _, last = (steps or "0").partition(":")
    if last:
        return int(first), int(last)
    return (2, int(first) + 1) if int(first) else None


ProfileSteps = Annotated[
    str | None,
    BeforeValidator(_as_text),
    AfterValidator(_checked),
    Field(
        description="Steps whose work on the devices is recorded in output_dir/profile, as FIRST:LAST, or their number "
        "from step 2 on."
    ),
]
