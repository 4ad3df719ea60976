"""Where a run says what it does: a terminal, which has one moving line, or a file, which has plain lines.

In a terminal, and in a notebook, the last line shows what goes on now. Elsewhere (nohup, CI, a pod's log) nothing
moves: each line has a time stamp, and one says every 30 seconds what goes on. All threads share one console, so that
lines stay whole. This file needs nothing but Python, because it is there before anything else is imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

INTERVAL = 30.0
"""Seconds between two plain lines that say what goes on."""
COLUMNS = 80
"""Width of a terminal that does not say its own."""

_TICK, _REDRAW = 0.5, 0.1  # seconds between ticks of a run's clock, and at least between two drawings

LAST = {"last": True}
"""As `extra` of a log record: it is what a command ends with, and is said whatever the level."""


class Shown(Protocol):
    """Something that goes on."""

    def moving(self, width: int) -> str:
        """Return it as the moving line, of at most `width` characters; "" for nothing yet."""
        ...

    def plain(self) -> str:
        """Return it as a plain line; "" for nothing yet."""
        ...


def duration(seconds: float) -> str:
    """Return a time such as 0:07, 3:12 or 26:01:40."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console:
    """One stream of lines, shared by all threads.

    Attributes:
        level: Least level of the lines that are written, as of `logging`.
        moves: Whether the moving line may be drawn.
        main: Whether this is the first process of the run; the others say errors only.

    Args:
        stream: Where to write; None for the stderr of each moment.
        live: Whether it has a moving line; None to ask the stream.
        clock: Seconds that only grow.
        stamp: Returns the time stamp of a plain line.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        stamp: Callable[[], str] = lambda: time.strftime("%Y-%m-%d %H:%M:%S"),
    ):
        self._given, self._live, self.clock, self._stamp = stream, live, clock, stamp
        self.level, self.moves, self.main = logging.INFO, True, True
        self._lock = threading.RLock()
        self._shown: list[Shown] = []
        self._drawn = ""  # the moving line as it stands
        self._drawn_at = -INTERVAL
        self._told_at = clock()  # when a plain line said what goes on
        self._gone = False

    @property
    def live(self) -> bool:
        """Whether there is a moving line: in a terminal and in a notebook."""
        if self._live is not None:
            return self._live
        stream = self._stream()
        return stream.isatty() or type(stream).__module__.startswith("ipykernel")

    def _stream(self) -> TextIO:
        return self._given or sys.stderr

    def _width(self) -> int:
        """Return the characters of a line that does not wrap."""
        try:
            columns = os.get_terminal_size(self._stream().fileno()).columns
        except (OSError, ValueError, AttributeError):  # no terminal, such as a notebook
            columns = COLUMNS
        return (columns or COLUMNS) - 1

    def says(self, level: int) -> bool:
        """Return whether lines of a level are written."""
        return level >= self.level and (self.main or level >= logging.ERROR)

    def say(self, text: str, level: int = logging.INFO, *, last: bool = False) -> None:
        """Write a line, above the moving one.

        Args:
            text: The line.
            level: Its level, as of `logging`.
            last: Whether it is what the command ends with, which is said at any level.
        """
        if not (self.says(level) or (last and self.main)):
            return
        word = logging.getLevelName(level).lower() if level != logging.INFO else ""
        text = f"{word}: {text}" if word else text
        with self._lock:
            if not self.live:
                text = "\n".join(f"{self._stamp()} {line}" for line in text.split("\n"))
            self._clear()
            if _foreign_bars():
                from tqdm import tqdm

                tqdm.write(text, file=self._stream())
            else:
                self._write(f"{text}\n")
            self._draw()

    def show(self, shown: Shown) -> None:
        """Begin to show something that goes on, instead of what was shown."""
        with self._lock:
            self._shown.append(shown)
            self._draw()

    def hide(self, shown: Shown) -> None:
        """End to show it, and show again what was shown before."""
        with self._lock:
            self._shown = [one for one in self._shown if one is not shown]
            self._clear()
            self._draw()

    def refresh(self) -> None:
        """Show what has changed, unless that was done just now."""
        with self._lock:
            if self.clock() - (self._drawn_at if self.live else self._told_at) >= (_REDRAW if self.live else INTERVAL):
                self._draw() if self.live else self._tell()

    def _tell(self) -> None:
        text = next(filter(None, (shown.plain() for shown in reversed(self._shown))), "")
        if text:
            self._told_at = self.clock()
            self.say(text)

    def _draw(self) -> None:
        if not (self._shown and self.live and self.moves and self.main):
            return
        if _foreign_bars():  # which would tear this line, and be torn
            return
        width = self._width()
        text = next(filter(None, (shown.moving(width) for shown in reversed(self._shown))), "")[:width]
        if text:
            self._write(f"\r{text}{' ' * (len(self._drawn) - len(text))}")
            self._drawn, self._drawn_at = text, self.clock()

    def _clear(self) -> None:
        if self._drawn:
            self._write(f"\r{' ' * len(self._drawn)}\r")
            self._drawn = ""

    def _write(self, text: str) -> None:
        if self._gone:
            return
        stream = self._stream()
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):  # the terminal was closed: nobody is there to be told, and the run goes on
            self._gone = True

    @contextlib.contextmanager
    def doing(self, what: str, delay: float = 0.0) -> Iterator[None]:
        """Show inside of a `with` block what goes on, and for how long.

        Args:
            what: What goes on, such as "loading the models".
            delay: Seconds after which it is shown.
        """
        shown = Doing(self, what, delay)
        self.show(shown)
        try:
            yield
        finally:
            self.hide(shown)
            self.say(f"{what}: {shown.seconds:.1f} s", logging.DEBUG)

    @contextlib.contextmanager
    def counting(self, what: str, total: int | None, unit: str, delay: float = 0.0) -> Iterator[Callable[[int], None]]:
        """Show inside of a `with` block how much of something is done.

        Args:
            what: What goes on, such as "checking".
            total: How many there are; None where nobody knows.
            unit: What is counted, in the plural.
            delay: Seconds after which it is shown.

        Yields:
            A function that is told how many more are done.
        """
        shown = Counting(self, what, total, unit, delay)
        self.show(shown)
        try:
            yield shown.add
        finally:
            self.hide(shown)

    @contextlib.contextmanager
    def ticking(self) -> Iterator[None]:
        """Let time pass on the console inside of a `with` block, so that a long wait is seen to go on."""
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(_TICK):
                self.refresh()

        thread = threading.Thread(target=tick, daemon=True, name="console")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with self._lock:
                self._shown = []
                self._clear()


class Doing:
    """Something that takes a time that nobody knows.

    Args:
        console: Where it is shown.
        what: What goes on.
        delay: Seconds after which it is shown.
    """

    def __init__(self, console: Console, what: str, delay: float = 0.0):
        self._clock, self._what, self._delay = console.clock, what, delay
        self._began = console.clock()

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return self._clock() - self._began

    def plain(self) -> str:
        """Return what goes on, and for how long."""
        return f"{self._what} … {duration(self.seconds)}" if self.seconds >= self._delay else ""

    def moving(self, width: int) -> str:
        """Return the same, cut to a width."""
        return self.plain()[:width]


class Counting(Doing):
    """Something that is done a number of times.

    Args:
        console: Where it is shown.
        what: What goes on.
        total: How many there are; None where nobody knows.
        unit: What is counted, in the plural.
        delay: Seconds after which it is shown.
    """

    def __init__(self, console: Console, what: str, total: int | None, unit: str, delay: float = 0.0):
        super().__init__(console, what, delay)
        self._console, self._total, self._unit, self._done = console, total, unit, 0

    def add(self, count: int = 1) -> None:
        """Count some more as done."""
        self._done += count
        self._console.refresh()

    def plain(self) -> str:
        """Return how many are done, and the time left at the same pace."""
        if self.seconds < self._delay:
            return ""
        of_all = "" if self._total is None else f" of {self._total:,}"
        text = f"{self._what}: {self._done:,}{of_all} {self._unit}, {duration(self.seconds)}"
        if self._total is not None and 0 < self._done < self._total:
            text += f", {duration(self.seconds / self._done * (self._total - self._done))} left"
        return text


def _foreign_bars() -> bool:
    """Return whether a library shows a bar of its own, such as that of a download."""
    module: Any = sys.modules.get("tqdm.std")
    return module is not None and any(not getattr(bar, "disable", True) for bar in list(module.tqdm._instances))


class Handler(logging.Handler):
    """Handler that writes log records as lines of the console; those of other libraries with the logger's name."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            text = record.getMessage()
            if record.name.partition(".")[0] not in OURS:
                text = f"{record.name}: {text}"
            if record.exc_info:
                text += f"\n{logging.Formatter().formatException(record.exc_info)}"
            current().say(text, record.levelno, last=getattr(record, "last", False))
        except Exception:
            self.handleError(record)


OURS = ("flax_diffusion", "torch_backend")
"""The packages of this project; their loggers have these names."""


_current = Console()


def current() -> Console:
    """Return the console of this process."""
    return _current


@contextlib.contextmanager
def using(console: Console) -> Iterator[Console]:
    """Make a console that of this process inside of a `with` block."""
    global _current
    before, _current = _current, console
    try:
        yield console
    finally:
        _current = before
