"""Processes that load data and are killed, at any moment: an error that says so, never a hang."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.source import ArraySource
from flax_diffusion.core.data.workers import Workers
from flax_diffusion.core.errors import DataError

MAX_SECONDS = 30
# A name of this length makes the source larger than what a pipe holds, so that a dead process cannot take it.
SOURCE = ArraySource(np.zeros((64, 4, 4), np.uint8), None, "x" * 1_000_000)


def large(source, seed, epoch, index, size=None):
    """An example that does not fit into a pipe."""
    return {"pixels": np.full((1, 128, 128), index, np.float32), "example_index": np.asarray(index, np.int64)}


def workers_of(steps) -> list[int]:
    return [process.pid for process in steps._micro_batches._processes]


TIMES = [(float(at), which) for at in np.arange(0, 6, 0.3) for which in ("one", "all")]
LONG = [pytest.param(*time, marks=pytest.mark.acceptance) for time in TIMES]


@pytest.mark.parametrize(("delay", "which"), [(0.0, "all"), (0.5, "one"), *LONG])
def test_killed_after(delay, which):
    """While it starts, makes batches, writes them, or waits until they are taken."""
    with Loader(SOURCE, large, seed=0, batch_size=8, num_workers=2) as loader:
        steps = iter(loader)
        victims = workers_of(steps)[: 1 if which == "one" else None]
        killed = []

        def kill():
            time.sleep(delay)
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            killed.append(time.monotonic())

        threading.Thread(target=kill).start()
        with pytest.raises(
            DataError, match=r"^a process that loads data was killed \(Killed\), as .* lower --dataload"
        ):
            for _ in steps:
                pass
        assert time.monotonic() - killed[0] < MAX_SECONDS
        assert list(steps) == []


def test_twice():
    """A new iteration after an error has new processes."""
    with Loader(SOURCE, large, seed=0, batch_size=8, num_workers=1) as loader:
        for _ in range(2):
            steps = iter(loader)
            next(steps)
            os.kill(*workers_of(steps), signal.SIGKILL)
            with pytest.raises(DataError, match="was killed"):
                list(steps)


def failing(places):
    raise RuntimeError("a defect")


def test_an_error_that_nobody_foresaw(capfd):
    workers = Workers(failing, 1)
    with pytest.raises(DataError, match="ended with exit status 1: see its output above"):
        next(workers)
    workers.close()
    assert "RuntimeError: a defect" in capfd.readouterr().err
    assert list(workers) == []


def numbers(places):
    return range(10)[places]


@pytest.mark.parametrize("count", [1, 3])
def test_order_and_end(count):
    workers = Workers(numbers, count)
    assert list(workers) == list(range(10))
    workers.close()


def test_processes_end_with_the_loader():
    loader = Loader(SOURCE, large, seed=0, batch_size=8, num_workers=2)
    steps = iter(loader)
    next(steps)
    processes = workers_of(steps)
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
