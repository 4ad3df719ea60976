"""Processes that make batches ahead of time, each its share of them.

One of them may be killed at any moment, most often by the system for lack of memory. So they share nothing that could
die with them, neither locks nor memory: each has a pipe from the main process and one to it, whose far ends it alone
holds, and whatever becomes of it, its pipe ends. (Grain's own processes, of 0.2.18, leave the main one waiting.)
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, BinaryIO

from flax_diffusion.core.errors import ConfigError, DataError, UserError

_LAST_WORDS = 5.0  # seconds from the end of a process's pipe to its exit status

_MOST, _MOST_A_CPU = 16, 4  # processes; more than both only wait for each other, and each takes memory of its own

MakeItems = Callable[[slice], Iterable[Any]]
"""Makes the items at some places of the whole stream, in order. Picklable."""


def check_count(count: int) -> None:
    """Checks how many processes are to be started.

    Args:
        count: Value of --dataloader_num_workers.

    Raises:
        ConfigError: If they are over 16 and over four for each CPU that this process may use.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(_MOST, _MOST_A_CPU * cpus)
    if count > most:
        raise ConfigError(
            f"--dataloader_num_workers {count}: at most {most} processes here, four for each of {cpus} CPUs or "
            f"{_MOST}; {cpus} are usually fastest, and 0 decodes in threads"
        )


class Workers(Iterator[Any]):
    """The items of a stream in order, of which process w of W makes w, w + W, w + 2W, and so on.

    Args:
        make: Makes a process's items.
        count: Processes.
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
            self._processes.append(process)
            self._results.append(os.fdopen(os.dup(from_worker.fileno()), "rb"))
            from_worker.close()
            tasks.append(to_worker)
        # Not as arguments of the process: Python writes those while it holds the pipe's other end too, so that it
        # would wait for ever for one that died before it read them.
        for number, task in enumerate(tasks):
            try:
                with task, open(task.fileno(), "wb", closefd=False) as file:
                    pickle.dump((make, slice(number, None, count)), file)
            except BrokenPipeError:
                continue  # it is dead, as the end of its results will say

    def __next__(self) -> Any:
        """The next item.

        Raises:
            UserError: What a process raised.
            DataError: If the process that makes the item is dead.
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
        process.join(_LAST_WORDS)
        status = process.exitcode
        if status is not None and status < 0:
            return DataError(
                f"a process that loads data was killed ({signal.strsignal(-status)}), as the system does when memory "
                "runs out: lower --dataloader_num_workers, or give the machine more memory"
            )
        return DataError(f"a process that loads data ended with exit status {status}: see above what it printed")

    def close(self) -> None:
        """Stops the processes. They hold nothing that is worth waiting for."""
        for process in self._processes:
            process.kill()
        for process, results in zip(self._processes, self._results, strict=True):
            process.join()
            process.close()
            results.close()
        self._processes, self._results = [], []


def _work(task: Connection, result: Connection) -> None:
    # What a terminal or a cluster sends to the whole group is for the main process, which may still want batches
    # on its way to a checkpoint.
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
    except BrokenPipeError:  # the main process wants no more, or is gone
        os._exit(0)


def _send(item: Any, results: BinaryIO) -> None:
    pickle.dump(item, results, protocol=5)  # which copies no array
    results.flush()
