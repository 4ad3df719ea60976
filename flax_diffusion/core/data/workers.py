"""Worker processes that make batches ahead of time, each its share of them.

A worker may be killed at any moment, most often by the system for lack of memory. So workers share nothing that could
be lost with them, neither locks nor memory. Each has one pipe from the main process and one to it, and only the worker
holds its ends of them. However it ends, its pipe closes and the main process notices. (With Grain 0.2.18's own worker
processes, the main process would wait for ever.)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, BinaryIO

from flax_diffusion.core.errors import ConfigError, DataError, UserError

_EXIT_SECONDS = 5.0  # longest wait for a worker's exit status after its pipe has closed

_PIPE_BYTES = 2**20  # as many as Linux gives without a question

_MAX_WORKERS, _MAX_WORKERS_PER_CPU = 16, 4  # more than both only wait for each other, and each takes memory

MakeItems = Callable[[slice], Iterable[Any]]
"""A picklable function that makes the items at some places of the whole stream, in order."""


def check_count(count: int) -> None:
    """Check the number of worker processes.

    Args:
        count: Value of --dataloader_num_workers.

    Raises:
        ConfigError: If it is over 16 and over four for each CPU that this process may use.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(_MAX_WORKERS, _MAX_WORKERS_PER_CPU * cpus)
    if count > most:
        raise ConfigError(
            f"--dataloader_num_workers {count}: at most {most} processes here, four for each of {cpus} CPUs or "
            f"{_MAX_WORKERS}; {cpus} are usually fastest, and 0 decodes in threads"
        )


class Workers(Iterator[Any]):
    """Iterator over the items of a stream in order; worker w of W makes items w, w + W, w + 2W, and so on.

    Args:
        make: Function that makes a worker's items.
        count: Number of workers.
    """

    def __init__(self, make: MakeItems, count: int):
        context = multiprocessing.get_context("spawn")
        self._turn = 0
        self._processes: list[SpawnProcess] = []
        self._results: list[BinaryIO] = []
        tasks: list[Connection] = []
        for _ in range(count):
            task, to_worker = context.Pipe(duplex=False)
            from_worker, result = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(task, result), daemon=True)
            process.start()
            task.close()
            result.close()
            _widen(from_worker)
            self._processes.append(process)
            self._results.append(os.fdopen(os.dup(from_worker.fileno()), "rb"))
            from_worker.close()
            tasks.append(to_worker)
        # Not as arguments of the process: Python writes those while it also holds the pipe's other end, so it would
        # wait for ever for a worker that died before it read them.
        for number, task in enumerate(tasks):
            try:
                with task, open(task.fileno(), "wb", closefd=False) as file:
                    pickle.dump((make, slice(number, None, count)), file)
            except BrokenPipeError:
                continue  # the worker is dead; `__next__` finds out when its results end

    def __next__(self) -> Any:
        """Return the next item.

        Raises:
            UserError: If a worker raised it.
            DataError: If the worker that makes the item is dead.
        """
        if not self._processes:
            raise StopIteration
        try:
            item = pickle.load(self._results[self._turn])  # noqa: S301  (of our own process)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._death(self._processes[self._turn]) from error
        if item is None:
            raise StopIteration
        if isinstance(item, UserError):
            raise item
        self._turn = (self._turn + 1) % len(self._processes)
        return item

    def _death(self, process: SpawnProcess) -> DataError:
        process.join(_EXIT_SECONDS)
        status = process.exitcode
        if status is not None and status < 0:
            return DataError(
                f"a process that loads data was killed ({signal.strsignal(-status)}), as the system does when memory "
                "runs out: lower --dataloader_num_workers, or give the machine more memory"
            )
        return DataError(f"a process that loads data ended with exit status {status}: see its output above")

    def close(self) -> None:
        """Kill the workers, which hold nothing that is worth waiting for."""
        for process in self._processes:
            process.kill()
        for process, results in zip(self._processes, self._results, strict=True):
            process.join()
            process.close()
            results.close()
        self._processes, self._results = [], []


def _widen(pipe: Connection) -> None:
    """Make room for more in a pipe than the usual 64 KiB, so that its two processes take fewer turns."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(PermissionError):  # all pipes of a user together have a limit, and any size will do
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _work(task: Connection, result: Connection) -> None:
    # Signals that a terminal or a cluster sends to the whole group are for the main process, which may still need
    # batches until its last checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with result, open(result.fileno(), "wb", closefd=False) as results:
            with task, open(task.fileno(), "rb", closefd=False) as file:
                make, places = pickle.load(file)  # noqa: S301  (of our own process)
            try:
                for item in make(places):
                    _send(item, results)
                _send(None, results)
            except UserError as error:
                _send(error, results)
    except BrokenPipeError:  # the main process needs no more, or has ended
        os._exit(0)


def _send(item: Any, results: BinaryIO) -> None:
    pickle.dump(item, results, protocol=5)  # protocol 5 copies no array
    results.flush()
