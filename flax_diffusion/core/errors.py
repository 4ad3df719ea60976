"""Errors that the user can fix. The command line prints their message, one line, and exits with status 2."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the phrase "; did you mean 'x'?" for the known name closest to `name`, or "" if none is close."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def nearest_multiples(value: int, factor: int) -> str:
    """Return a phrase such as "64 or 128": the multiples of `factor` next to `value`, without 0."""
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def shown(value: object) -> str:
    """Return a value as text for a message, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


_SHOWN_DIFFERENCES = 3


def differences(was: Any, now: Any, name: str = "") -> list[str]:
    """List where two JSON values differ, such as "picture resolution 16 → 24".

    Args:
        was: The first value.
        now: The second one.
        name: What the values are, the start of each text.
    """
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        names = list(dict.fromkeys([*was, *now]))
        return [text for one in names for text in differences(was.get(one), now.get(one), f"{name} {one}".strip())]
    return [] if was == now else [f"{name} {shown(was)} → {shown(now)}"]


def first_differences(texts: list[str]) -> str:
    """Join the first three texts of `differences` for a message."""
    return "; ".join(texts[:_SHOWN_DIFFERENCES]) + ("; …" if len(texts) > _SHOWN_DIFFERENCES else "")


SECRET = re.compile(r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{20,}")
"""What no message may show: user and password in an address, a token of the Hub."""


class UserError(Exception):
    """An error in what the user gave. Its message is one line: the value, the rule and the fix.

    The message is safe to print, whatever the value holds: it has no control characters and no secrets.
    """

    exit_status = 2

    def __init__(self, message: str):
        line = SECRET.sub("…", " ".join(message.split()))
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


class ConfigError(UserError):
    """An option, a config file or a combination of options that cannot be run."""


class DataError(UserError):
    """A dataset, an image or a caption that cannot be used.

    Args:
        message: The message, as of every user error.
        example: Name of the example that the error is about, if it is about one.
    """

    def __init__(self, message: str, example: str | None = None):
        super().__init__(message)
        self.example = example


class WeightsError(UserError):
    """A model folder or weights file that does not fit the model."""


class CheckpointError(UserError):
    """A training checkpoint that cannot be resumed from."""


class NonFiniteError(UserError):
    """A loss in training that is infinite or not a number."""

    exit_status = 1


class MemoryLimitError(UserError):
    """Options that need more memory than a device or the host has."""

    exit_status = 1


class CallbackError(UserError):
    """A callback of `train` that raised an error, which is the `__cause__` of this one."""

    exit_status = 1


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Put the name of an option in front of the messages of user errors raised inside the `with` block.

    Args:
        option: Name of the option whose value is being used.
    """
    try:
        yield
    except (ConfigError, DataError, WeightsError) as error:
        raise type(error)(f"{option}: {error}") from error


_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|can.t allocate memory|Unable to allocate", re.IGNORECASE)
"""Messages of XLA, CUDA, PyTorch's host allocator and NumPy when memory runs out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of any framework says that memory ran out. A full disk does not count."""
    text = str(error)
    return isinstance(error, MemoryError) or (bool(_OUT_OF_MEMORY.search(text)) and "No space left" not in text)


def unknown(what: str, value: object, known: Iterable[str]) -> ConfigError:
    """Make the error for a value that is not among the known ones.

    Args:
        what: What has the value, such as the name of an option.
        value: The unknown value.
        known: The values that are allowed.

    Returns:
        The error, which lists the known values and suggests the closest one.
    """
    known = list(known)
    return ConfigError(f"{what} {shown(value)} is unknown; use one of {', '.join(known)}{nearest(value, known)}")
