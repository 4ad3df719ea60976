"""Recordings of steps, which programs that show such files open."""

import gzip
import json
from contextlib import ExitStack

import pytest
from tiny import ONE_BLOCK, RUN, UNET

import flax_diffusion.train
import torch_backend.train
from flax_diffusion.core.config.profiling import profile_range
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.preemption import Preempted
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.core.tracking.profile import Profile

BACKENDS = {"jax": flax_diffusion.train, "torch": torch_backend.train}
SMALL = RUN | {"unet": UNET | ONE_BLOCK, "max_train_steps": 4, "draw_samples": False, "report_to": "none"}


def is_inside(one, other):
    return one is not other and other["ts"] <= one["ts"] < other["ts"] + other["dur"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recording_opens(tmp_path, backend):
    run = BACKENDS[backend].train("unconditional", **SMALL, profile_steps="2:3", output_dir=str(tmp_path / "run"))
    if backend == "jax":
        (file,) = (run / "profile").rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        assert len([*(run / "profile").rglob("*.xplane.pb")]) == 1  # which TensorBoard's plug-in reads
        calls = [event for event in events if event.get("name") == "PjitFunction(train_step)"]
        took = [one for one in calls if not any(is_inside(one, other) for other in calls)]
        assert len(took) == 2
    else:
        (file,) = (run / "profile").glob("*.pt.trace.json")
        events = json.loads(file.read_text())["traceEvents"]
        took = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step#")]
        assert len(took) == 2
        BACKENDS[backend].train("unconditional", **SMALL, overwrite_output_dir=True, output_dir=str(run))
        assert not (run / "profile").exists()


class Recorder:
    """A backend that notes when it records."""

    process_index = 0

    def __init__(self):
        self.noted = []

    def profiled(self, folder):
        recorder = self

        class Recording:
            def __enter__(self):
                recorder.noted.append("begins")

            def __exit__(self, *args):
                recorder.noted.append("ends")

        return Recording()


@pytest.mark.parametrize(
    ("first", "noted"), [(1, [1, "begins", 2, 3, "ends", 4]), (3, ["begins", 3, "ends", 4]), (4, [4])]
)
def test_which_steps(tmp_path, first, noted):
    """Also of a run that goes on in the middle of them, or after them."""
    backend, said = Recorder(), []
    for step in Profile((2, 3), backend, tmp_path, said.append).over(iter(range(first, 5)), first):
        backend.noted.append(step)
    assert backend.noted == noted
    assert len(said) == ("begins" in noted)


def test_a_run_that_is_told_to_end(tmp_path):
    """What is recorded by then is kept."""
    backend, said = Recorder(), []
    profile = Profile((1, 9), backend, tmp_path, said.append)

    def steps():
        for step in profile.over(iter(range(1, 5)), 1):
            if step == 2:
                raise Preempted

    with pytest.raises(Preempted):
        steps()
    profile.close()
    profile.close()
    assert backend.noted == ["begins", "ends"]
    assert len(said) == 1


@pytest.mark.parametrize("error", [OSError("No space left on device"), RuntimeError("Can't create directory")])
def test_a_recording_that_cannot_be_written(tmp_path, caplog, error):
    """The run goes on, and says so; JAX's profiler and PyTorch's raise a RuntimeError where they cannot write."""

    def fail():
        raise error

    class Full(Recorder):
        def profiled(self, folder):
            stack = ExitStack()
            stack.callback(fail)
            return stack

    said = []
    steps = [*Profile((2, 3), Full(), tmp_path, said.append).over(iter(range(1, 5)), 1)]
    assert steps == [1, 2, 3, 4]
    assert not said
    assert f"steps 2 to 3 are not recorded in {tmp_path / 'profile'}: {error}" in caplog.text


def test_the_number_of_the_old_flax_script():
    """`train_controlnet_flax.py` leaves the first step, which compiles, out of it."""
    for steps, asked in {"0": None, "3": (2, 4), 3: (2, 4), "3:3": (3, 3), None: None}.items():
        config = UnconditionalConfig(dataset_name="digits", profile_steps=steps)
        assert profile_range(config.profile_steps) == asked


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ("5:2", "--profile_steps: write the first and last step, such as 10:15, got '5:2'"),
        ("0:2", "--profile_steps: write the first and last step, such as 10:15, got '0:2'"),
        ("a:b", "--profile_steps: write the first and last step, such as 10:15, got 'a:b'"),
        ("4", "--profile_steps 4: the run ends after step 4; name steps before"),
        ("2:5", "--profile_steps 2:5: the run ends after step 4; name steps before"),
    ],
)
def test_bad_input(tmp_path, steps, says):
    with pytest.raises(ConfigError, match=says):
        flax_diffusion.train.train("unconditional", **SMALL, profile_steps=steps, output_dir=str(tmp_path / "run"))
