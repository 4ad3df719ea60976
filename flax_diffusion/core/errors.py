"""Errors that are the user's to fix. The command line prints their one line and exits with status 2."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


def nearest(name: object, known: Iterable[str]) -> str:
    """The phrase "; did you mean 'x'?" for the known name closest to `name`, or nothing."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def nearest_multiples(value: int, factor: int) -> str:
    """The phrase "64 or 128" for the multiples of a number next to a value; none of them is 0."""
    below = value // factor * factor
    return f"{below} or {below + factor}" if below else str(factor)


def shown(value: object) -> str:
    """A value for a message, not all of it if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


SECRET = re.compile(r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{20,}")
"""What is for nobody's eyes: user and password in an address, a token of the Hub."""


class UserError(Exception):
    """Something in the input is wrong. The message is one line: the value, the rule and the fix.

    It is safe to print, whatever the value holds: no control characters, no secrets.
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
        message: As every user error's.
        example: The name of the example that it is about, where it is about one.
    """

    def __init__(self, message: str, example: str | None = None):
        super().__init__(message)
        self.example = example


class WeightsError(UserError):
    """A model folder or weights file that does not fit the model."""


class CheckpointError(UserError):
    """A training checkpoint that cannot be resumed from."""


class NonFiniteError(UserError):
    """Training produced a loss that is not a number or infinite."""

    exit_status = 1


class MemoryLimitError(UserError):
    """What the options ask for does not fit a device's or the host's memory."""

    exit_status = 1


@contextlib.contextmanager
def naming(option: str) -> Iterator[None]:
    """Puts the option that has the value in front of the user's errors of what is done with it."""
    try:
        yield
    except (ConfigError, DataError, WeightsError) as error:
        raise type(error)(f"{option}: {error}") from error


_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|can.t allocate memory|Unable to allocate", re.IGNORECASE)
"""As XLA, CUDA, PyTorch's host allocator and NumPy say it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error of any framework says that memory ran out. A disk that is full is something else."""
    text = str(error)
    return isinstance(error, MemoryError) or (bool(_NO_MEMORY.search(text)) and "No space left" not in text)


def unknown(what: str, value: object, known: Iterable[str]) -> ConfigError:
    """Makes the error for a value that is none of those there are.

    Args:
        what: Names what has the value.
        value: The value.
        known: Those there are.
    """
    known = list(known)
    return ConfigError(f"{what} {shown(value)} is unknown; use one of {', '.join(known)}{nearest(value, known)}")
