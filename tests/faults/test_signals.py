"""SIGTERM and Ctrl-C: the step is finished and saved, and the process ends, whatever it was at."""

import ctypes
import os
import random
import signal
import time
from pathlib import Path

import pytest
import yaml
from faults.trials import BACKENDS, STEPS, assert_same, ended, go_on, left, log_of, start, wait_for

from flax_diffusion.core.checkpoints.folders import committed, find_damage, step_of

SECONDS = 5
QUICK = {"checkpointing_steps": 1000, "checkpoints_total_limit": None}


def backend_class(backend):
    if backend == "flax_diffusion":
        from flax_diffusion.jax_backend.backend import JaxBackend

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
    from flax_diffusion.core.checkpoints import folders
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
        ExampleFn.unscaled = stays(
            ExampleFn.unscaled, 12 * 8 + 1, 60
        )  # far ahead of what is made before the first step
    elif state == "sample":
        owner.sample = stays(owner.sample, 1, 60)
    elif state == "save":
        folders.seal = stays(folders.seal, 1, 2)
    elif state == "compile":  # which cannot be cut short
        owner.train_step = stays(owner.train_step, 1, 0.5)


def steps_said(sign):
    return int(Path(sign).read_text() or 0) if Path(sign).exists() else 0


def end(process, folder, times=1, number=signal.SIGTERM):
    """Sends the signal; returns the seconds that it took."""
    began = time.monotonic()
    for _ in range(times):
        if process.is_alive():
            os.kill(process.pid, number)
        time.sleep(0.05)
    assert ended(process) == (130 if number == signal.SIGINT else 0), log_of(folder)
    return time.monotonic() - began


def saved_step(folder, told="SIGTERM"):
    last = committed(folder)[-1]
    assert find_damage(last) is None
    assert f"ended by {told} after step {step_of(last)}, saved as {last.name}; go on with" in log_of(folder)
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


def test_ctrl_c(tmp_path):
    """Saves as SIGTERM does, and says how to go on; the command that it names does."""
    folder, sign = tmp_path / "run", tmp_path / "steps"
    process = start("torch_backend", folder, (tell, "torch_backend", str(sign)), **QUICK)
    wait_for(lambda: steps_said(sign) >= 3, process)
    assert end(process, folder, number=signal.SIGINT) < SECONDS
    step = saved_step(folder, "Ctrl-C")
    assert step == steps_said(sign)
    words = log_of(folder).rpartition("go on with: ")[2].split()
    assert words[:4] == ["python", "-m", "torch_backend.train", "--config"]
    recipe = yaml.safe_load(Path(words[4]).read_text())
    assert (recipe["task"], recipe["max_train_steps"]) == ("unconditional", STEPS)
    assert words[5:7] == ["--resume_from_checkpoint", "latest"]


@pytest.mark.parametrize("state", ["save", "compile"])
def test_ctrl_c_twice_ends_at_once(tmp_path, state):
    """Also while something that cannot be interrupted holds the main thread."""
    folder, sign = tmp_path / "run", tmp_path / "sign"
    process = start("torch_backend", folder, (hold, str(sign), state), **QUICK | {"checkpointing_steps": 3})
    wait_for(sign.exists, process)
    took = end(process, folder, times=2, number=signal.SIGINT)
    assert took < SECONDS
    assert not committed(folder)
    assert "press it again to end at once" in log_of(folder)


def hold(sign, state):
    """Blocks a save in its thread, or the main thread where it takes a step, in C and for a minute."""
    from flax_diffusion.core.checkpoints import folders
    from torch_backend.backend import TorchBackend

    owner, name = {"save": (folders, "seal"), "compile": (TorchBackend, "train_step")}[state]

    def held(*arguments):
        Path(sign).touch()
        library = ctypes.CDLL(None)
        for _ in range(60):  # a signal ends a sleep early
            library.sleep(1)

    setattr(owner, name, held)


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
