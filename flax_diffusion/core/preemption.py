"""SIGTERM: what a machine that is taken back is sent, and a cluster's job that is ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Preempted(BaseException):
    """Leaves what can be left at once. No `except Exception` on its way takes it for a failure."""


class Preemption:
    """Within it, SIGTERM no longer ends the process: it is noted, and the run ends itself.

    Only the main thread can hear signals; elsewhere nothing changes.

    Attributes:
        wanted: A signal came.
        alone: This process may leave without the others of its run.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.alone = True
        self._leaves = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        if self._leaves:
            self._leaves = False  # once: a second signal must not disturb the leaving
            raise Preempted

    @contextmanager
    def leaves(self) -> Iterator[None]:
        """Raises `Preempted` as soon as a signal comes: around what takes long and changes nothing that is kept."""
        self._leaves = self.alone
        try:
            if self.wanted and self.alone:
                raise Preempted
            yield
        finally:
            self._leaves = False
