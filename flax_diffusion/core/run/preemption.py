"""Ending a run early: on SIGTERM, which a machine or a cluster sends before it takes a job back, or on Ctrl-C (SIGINT).

A signal raises no exception at the point where it arrives. It is noted, and code that waits for long checks for it. So
no saved file is ever left half changed, and no lock is left held.
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
"""Exit status after Ctrl-C, the usual one in shells."""

_POLL_SECONDS = 0.05  # between two checks for a signal while interruptible work runs
_REPEAT_SECONDS = 1.0  # launchers of several processes send a terminal's Ctrl-C again to those that already got it

Result = TypeVar("Result")


class Preempted(BaseException):
    """A signal has asked the run to end. Not an `Exception`, so that nobody handles it as a failure."""


class Preemption:
    """Context in which SIGTERM and SIGINT do not end the process: the first one is noted, and the run ends itself.

    A second SIGINT ends the process at once, whatever it is doing. Only the main thread can install this; in other
    threads nothing changes.

    Attributes:
        requested: Whether a signal has asked the run to end.
        signal_name: Name of that signal for messages, "SIGTERM" or "Ctrl-C", or the reason of `end`.
        interrupted: Whether it was SIGINT.
        single_process: Whether this process may end without waiting for other processes of its run.
    """

    def __init__(self) -> None:
        self.requested = self.interrupted = False
        self.signal_name = "SIGTERM"
        self.single_process = True
        self._interrupted_at = 0.0
        self._previous_handlers: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_wakeup_fd = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def _listen(self) -> None:
        """Watch for signals in a separate thread, so that they are noticed while a compiler holds the main thread."""
        self._pipe = read, write = os.pipe()
        os.set_blocking(write, False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals").start()
        for number in (signal.SIGTERM, signal.SIGINT):
            if (
                signal.getsignal(number) != signal.SIG_IGN
            ):  # a shell that starts a job in the background has SIGINT ignored
                self._previous_handlers[number] = signal.signal(number, lambda number, frame: None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_wakeup_fd)
            os.close(self._pipe[1])  # this ends the thread
            self._pipe = None

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                self.handle(number)
        os.close(pipe)

    def handle(self, number: int) -> None:
        """Note that a signal has arrived.

        Args:
            number: Number of the signal; all but SIGTERM and SIGINT are ignored.
        """
        if number == signal.SIGINT:
            self._handle_interrupt()
        elif number == signal.SIGTERM:
            self.requested = True

    def _handle_interrupt(self) -> None:
        now = time.monotonic()
        if not self.interrupted:
            self._interrupted_at, self.interrupted, self.signal_name = now, True, "Ctrl-C"
            if self.single_process:
                self.requested = True
                log.warning(
                    "Ctrl-C: the current step is finished and saved first; press it again to end at once without saving"
                )
            else:
                os.kill(os.getpid(), signal.SIGTERM)  # backends then end all processes after the same step
        elif self.single_process or now - self._interrupted_at > _REPEAT_SECONDS:
            os._exit(INTERRUPTED)

    def end(self, reason: str) -> None:
        """Ask the run to end as a signal does, in all of its processes.

        Args:
            reason: The reason, for messages of this process.
        """
        self.requested, self.signal_name = True, reason
        if not self.single_process and self._pipe is not None:
            os.kill(os.getpid(), signal.SIGTERM)  # backends then end all processes after the same step

    def interruptible(self, work: Callable[[], Result]) -> Result:
        """Do work that may take long, but stop waiting for it as soon as a signal comes.

        In a run of several processes the work is waited for, because the others may take part in it.

        Args:
            work: A function that changes no saved file. It runs in a separate thread, which runs to its end even if
                nobody waits for it any more.

        Returns:
            What `work` returned.

        Raises:
            Preempted: If a signal came, before or during the work.
        """
        self._raise_if_requested()
        if self.single_process and self._pipe is not None:
            done: Future[Result] = Future()
            threading.Thread(target=_run, args=(work, done), daemon=True, name="interruptible").start()
            while not wait([done], _POLL_SECONDS).done:
                self._raise_if_requested()
            result = done.result()
        else:
            result = work()
        self._raise_if_requested()
        return result

    def _raise_if_requested(self) -> None:
        if self.requested and self.single_process:
            raise Preempted


def _run(work: Callable[[], Any], done: Future[Any]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:  # the waiting thread handles it
        done.set_exception(error)
