"""Errors that are the user's to fix. The command line prints their one line and exits with status 2."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """The phrase "; did you mean 'x'?" for the known name closest to `name`, or nothing."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


class UserError(Exception):
    """Something in the input is wrong. The message is one line: the value, the rule and the fix."""

    exit_status = 2

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """An option, a config file or a combination of options that cannot be run."""


class DataError(UserError):
    """A dataset, an image or a caption that cannot be used."""


class WeightsError(UserError):
    """A model folder or weights file that does not fit the model."""


class CheckpointError(UserError):
    """A training checkpoint that cannot be resumed from."""


class NonFiniteError(UserError):
    """Training produced a loss that is not a number or infinite."""

    exit_status = 1
