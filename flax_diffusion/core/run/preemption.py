"""Being told to end: by SIGTERM, as a machine that is taken back is and a cluster's job, or by Ctrl-C (SIGINT).

A signal raises nothing where it comes: it is noted, and whoever waits for long looks. So nothing that is saved is ever
half changed, and no lock is left held.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self, TypeVar

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

_LOOKS = 0.05  # seconds between two looks for a signal while something long runs
_SAME_SECONDS = 1.0  # launchers of several processes pass a terminal's Ctrl-C on to those that have it already

Result = TypeVar("Result")


class Preempted(BaseException):
    """Leaves what can be left at once. No `except Exception` on its way takes it for a failure."""


class Preemption:
    """Within it, SIGTERM and SIGINT no longer end the process: the first is noted, and the run ends itself.

    A second SIGINT ends the process at once, whatever it is at. Only the main thread can set this up; elsewhere
    nothing changes.

    Attributes:
        wanted: A signal came.
        told: By what, for messages: "SIGTERM" or "Ctrl-C".
        interrupted: It was SIGINT.
        alone: This process may end without the others of its run.
    """

    def __init__(self) -> None:
        self.wanted = self.interrupted = False
        self.told = "SIGTERM"
        self.alone = True
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._pipe_before = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def _listen(self) -> None:
        """Hears signals in a thread of its own, so that they are also heard while a compiler holds the main thread."""
        self._pipe = read, write = os.pipe()
        os.set_blocking(write, False)
        self._pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals").start()
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as of a job that a shell starts in the background
                self._before[number] = signal.signal(number, lambda number, frame: None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._pipe_before)
            os.close(self._pipe[1])  # which ends the thread
            self._pipe = None

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                self.hear(number)
        os.close(pipe)

    def hear(self, number: int) -> None:
        """Takes note of a signal.

        Args:
            number: Of the signal; other ones than SIGTERM and SIGINT mean nothing here.
        """
        if number == signal.SIGINT:
            self._hear_interrupt()
        elif number == signal.SIGTERM:
            self.wanted = True

    def _hear_interrupt(self) -> None:
        now = time.monotonic()
        if not self.interrupted:
            self._since, self.interrupted, self.told = now, True, "Ctrl-C"
            if self.alone:
                self.wanted = True
                log.warning("Ctrl-C: the step under way is finished and saved; once more ends at once, unsaved")
            else:
                os.kill(os.getpid(), signal.SIGTERM)  # by which all processes of the run end after one step
        elif self.alone or now - self._since > _SAME_SECONDS:
            os._exit(INTERRUPTED)

    def aside(self, work: Callable[[], Result]) -> Result:
        """Does what takes long; leaves it behind as soon as a signal comes, unless other processes take part in it.

        Args:
            work: Changes nothing that is saved. It runs in a thread of its own, and to its end even if it is left
                behind.

        Raises:
            Preempted: If a signal came, before or meanwhile.
        """
        self._leave()
        if self.alone and self._pipe is not None:
            done: Future[Result] = Future()
            threading.Thread(target=_run, args=(work, done), daemon=True, name="aside").start()
            while not wait([done], _LOOKS).done:
                self._leave()
            result = done.result()
        else:
            result = work()
        self._leave()
        return result

    def _leave(self) -> None:
        if self.wanted and self.alone:
            raise Preempted


def _run(work: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # it is the waiting thread's to handle
        done.set_exception(error)
