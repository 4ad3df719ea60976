"""SIGTERM: the step is finished and saved, and the process ends with status 0, whatever it was at."""

import os
import random
import time
from pathlib import Path

import pytest
from faults.trials import BACKENDS, assert_same, ended, go_on, left, log_of, start, wait_for

from flax_diffusion.core.checkpoints import committed, damage, step_of

SECONDS = 5
QUICK = {"checkpointing_steps": 1000, "checkpoints_total_limit": None}


def backend_class(backend):
    if backend == "flax_diffusion":
        from flax_diffusion.backend import JaxBackend

        return JaxBackend
    from torch_backend.backend import TorchBackend

    return TorchBackend


def tell(backend, sign):
    """Writes the number of each step that starts into a file."""
    owner = backend_class(backend)
    real, taken = owner.train_step, 0
    file = os.open(sign, os.O_CREAT | os.O_WRONLY)

    def train_step(self, *arguments):
        nonlocal taken
        taken += 1
        os.pwrite(file, str(taken).encode(), 0)
        return real(self, *arguments)

    owner.train_step = train_step


def in_state(backend, sign, state):
    """Gets into a state and stays there, where it can for a minute; says in a file that it is there."""
    from flax_diffusion.core import checkpoints
    from flax_diffusion.core.data.batches import ExampleFn

    tell(backend, f"{sign}.steps")
    owner = backend_class(backend)

    def stays(real, first, pause):
        calls = 0

        def replaced(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == first:
                Path(sign).touch()
                for _ in range(round(pause * 10)):
                    time.sleep(0.1)
            return real(*arguments, **keywords)

        return replaced

    if state == "data":
        ExampleFn.__call__ = stays(
            ExampleFn.__call__, 12 * 8 + 1, 60
        )  # far ahead of what is made before the first step
    elif state == "sample":
        owner.sample = stays(owner.sample, 1, 60)
    elif state == "save":
        checkpoints.seal = stays(checkpoints.seal, 1, 2)
    elif state == "compile":  # which cannot be cut short
        owner.train_step = stays(owner.train_step, 1, 0.5)


def steps_said(sign):
    return int(Path(sign).read_text() or 0) if Path(sign).exists() else 0


def end(process, folder, times=1):
    """Sends the signal; returns the step that was saved and the seconds that it took."""
    began = time.monotonic()
    for _ in range(times):
        process.terminate()  # one that has ended by then is left alone
        time.sleep(0.05)
    assert ended(process) == 0, log_of(folder)
    return time.monotonic() - began


def saved_step(folder):
    last = committed(folder)[-1]
    assert damage(last) is None
    assert f"ended by SIGTERM after step {step_of(last)}; go on with" in log_of(folder)
    return step_of(last)


def check_random(tmp_path, backend, count):
    draw, slowest = random.Random(0), 0.0
    for number in range(count):
        folder, sign = tmp_path / str(number), tmp_path / f"{number}.steps"
        process = start(backend, folder, (tell, backend, str(sign)), **QUICK)
        target = draw.randint(1, 150)
        wait_for(lambda target=target, sign=sign: steps_said(sign) >= target, process)
        before = steps_said(sign)
        slowest = max(slowest, end(process, folder, times=1 + number % 2))
        assert before <= saved_step(folder) == steps_said(sign)
    return slowest


def test_a_signal(tmp_path):
    assert check_random(tmp_path, "torch_backend", 1) < SECONDS


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_signals(tmp_path, backend, figure):
    slowest = check_random(tmp_path, backend, 20)
    assert slowest < SECONDS
    whole = tmp_path / "whole"
    assert ended(start(backend, whole, **QUICK)) == 0
    for number in range(2):
        go_on(backend, tmp_path / str(number), **QUICK)
        assert_same(left(tmp_path / str(number)), left(whole))
    figure(3, f"{backend}: SIGTERM to 20 runs: status 0 and the step saved in all, after {slowest:.1f} s at most")


@pytest.mark.acceptance
@pytest.mark.parametrize("state", ["data", "sample", "save", "compile"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signal_in_any_state(tmp_path, backend, state, figure):
    folder, sign = tmp_path / "run", tmp_path / "sign"
    options = QUICK | {"validation_steps": 3, "checkpointing_steps": 3 if state == "save" else 1000}
    process = start(backend, folder, (in_state, backend, str(sign), state), **options)
    wait_for(sign.exists, process)
    took = end(process, folder, times=2)
    assert saved_step(folder) == steps_said(f"{sign}.steps")
    assert took < SECONDS
    figure(3, f"{backend}: SIGTERM twice, state {state}: saved and ended after {took:.1f} s")
