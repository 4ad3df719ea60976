"""Two hosts, one of which is killed or told to end."""

import random
import signal
import time

import numpy as np
import pytest
from hosts import log_of, start_together
from tiny import ONE_BLOCK, RUN, UNET, losses

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.checkpoints.folders import committed, find_damage, step_of

HEARTBEAT, STEPS = 10, 30
FAILING = """
import json, sys
from flax_diffusion.train import Callback, train

class Failing(Callback):
    def on_step(self, step, metrics):
        if step == 4:
            raise ValueError("boom")

values = json.load(open(sys.argv[-1]))
train(values.pop("task"), callbacks=[Failing()], **values)
"""
OPTIONS = RUN | {
    "task": "unconditional", "global_batch_size": 8, "max_train_steps": STEPS, "checkpointing_steps": 3,
    "validation_epochs": None, "eval_batch_size": 1, "fsdp_parallelism": 8, "use_ema": True,
    "unet": UNET | ONE_BLOCK,
}  # fmt: skip


def begin(request, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    values = OPTIONS | options | {"output_dir": str(folder / "run")}
    return start_together(request, folder, 2, values, {"JAX_HEARTBEAT_TIMEOUT_SECONDS": str(HEARTBEAT)})


def finish(processes, folder, within=300):
    codes = [process.wait(within) for process in processes]
    assert codes == [0, 0], log_of(folder, 0) + log_of(folder, 1)


def wait_for_step(folder, processes, step):
    until = time.monotonic() + 300
    while not any(step_of(one) >= step for one in committed(folder / "run")):
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), log_of(folder, 0) + log_of(folder, 1)
        time.sleep(0.05)


def left(folder):
    arrays, metadata = portable.read(folder / f"run/checkpoint-{STEPS}")
    return arrays, metadata, losses(folder / "run")


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    finish(begin(request, folder), folder)
    return left(folder)


@pytest.mark.acceptance
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_one_is_killed(request, tmp_path, whole, victim, figure):
    """The other ends too, and the restart of both comes to the same end."""
    draw, slowest = random.Random(victim), 0.0
    for number in range(10):
        folder = tmp_path / str(number)
        processes = begin(request, folder)
        wait_for_step(folder, processes, draw.randint(1, 6) * 3)
        time.sleep(draw.uniform(0, 1))
        processes[victim].send_signal(signal.SIGKILL)
        began = time.monotonic()
        assert processes[victim].wait() == -signal.SIGKILL
        assert processes[1 - victim].wait(HEARTBEAT + 5) != 0
        slowest = max(slowest, time.monotonic() - began)
        assert all(find_damage(one) is None for one in committed(folder / "run"))
        finish(begin(request, folder, resume_from_checkpoint="latest"), folder)
        for ours, theirs in zip(left(folder)[0].items(), whole[0].items(), strict=True):
            assert ours[0] == theirs[0]
            np.testing.assert_array_equal(ours[1], theirs[1], err_msg=ours[0])
        assert left(folder)[1:] == whole[1:]
    name = ["coordinator", "worker"][victim]
    figure(
        4,
        f"{name} of two processes killed 10 times: the other ended after {slowest:.1f} s at most (heartbeat "
        f"{HEARTBEAT} s); bitwise the same after the restart",
    )


@pytest.mark.acceptance
@pytest.mark.parametrize("told", [0, 1])
def test_one_is_told_to_end(request, tmp_path, told, figure):
    """Both save the same step and end well."""
    processes = begin(request, tmp_path, max_train_steps=2000, checkpointing_steps=7)
    wait_for_step(tmp_path, processes, 7)
    processes[told].send_signal(signal.SIGTERM)
    began = time.monotonic()
    finish(processes, tmp_path)
    took = time.monotonic() - began
    last = committed(tmp_path / "run")[-1]
    assert find_damage(last) is None
    assert f"ended by SIGTERM after step {step_of(last)}, saved as {last.name}; go on with" in log_of(tmp_path, 0)
    figure(4, f"SIGTERM to process {told} of two: both saved step {step_of(last)} and ended after {took:.1f} s")


@pytest.mark.acceptance
def test_a_callback_that_raises(request, tmp_path):
    """Only the first host calls it. Both save the same step and end, the second one without an error."""
    values = OPTIONS | {"output_dir": str(tmp_path / "run"), "checkpointing_steps": STEPS}
    processes = start_together(request, tmp_path, 2, values, program=("-c", FAILING))
    assert [process.wait(300) for process in processes] == [1, 0], log_of(tmp_path, 0) + log_of(tmp_path, 1)
    said = log_of(tmp_path, 0)
    (saved,) = committed(tmp_path / "run")
    assert 6 <= step_of(saved) < STEPS
    assert find_damage(saved) is None
    assert f"ended by an error in Failing.on_step after step {step_of(saved)}, saved as {saved.name}" in said
    assert (
        f"callback Failing.on_step failed at step 4 (ValueError: boom); the newest checkpoint is {saved.name}" in said
    )
