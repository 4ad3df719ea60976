"""A run that was stopped ends bit for bit as one that was not."""

import inspect
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from tiny import ONE_BLOCK, RUN, VAE

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.backend import JaxBackend
from torch_backend.backend import TorchBackend

BACKENDS = {"flax_diffusion": JaxBackend, "torch_backend": TorchBackend}
STEPS = 20
CONFIG = RUN | {
    "max_train_steps": STEPS,
    "use_ema": True,
    "noise_offset": 0.1,
    "random_flip": True,
    "gradient_accumulation_steps": 2,
    "validation_epochs": None,
    "save_model_epochs": None,
    "unet": RUN["unet"] | ONE_BLOCK | {"dropout": 0.1},
    "report_to": "none",
}


def run(backend, folder, until=None, **options):
    """Trains, where asked to no further than some step; returns all arrays and the metadata of the last checkpoint."""

    def make(config, spec):
        made = BACKENDS[backend](config, spec)
        if until is not None:
            made.should_stop = lambda requested, step: step == until
        return made

    fit(task_of(UnconditionalConfig(output_dir=str(folder), **CONFIG | options)), make)
    return portable.read(folder / f"checkpoint-{until or (CONFIG | options)['max_train_steps']}")


def assert_same(final, expected):
    assert final[0].keys() == expected[0].keys()
    for name, array in expected[0].items():
        np.testing.assert_array_equal(final[0][name], array, err_msg=name)
    assert final[1] == expected[1]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(backend, tmp_path_factory):
    """What a run ends with that saved nothing before its end."""
    return run(backend, tmp_path_factory.mktemp("never"), checkpointing_steps=STEPS)


@pytest.fixture(scope="module")
def saved(backend, tmp_path_factory, uninterrupted):
    """A folder with checkpoints 4, 8, … of the same run."""
    return checkpoints_of_a_run(backend, tmp_path_factory.mktemp("some"), uninterrupted, 4)


@pytest.fixture(scope="module")
def all_saved(backend, tmp_path_factory, uninterrupted):
    """A folder with the checkpoint of every step of the same run."""
    return checkpoints_of_a_run(backend, tmp_path_factory.mktemp("every"), uninterrupted, 1)


def checkpoints_of_a_run(backend, folder, expected, every):
    assert_same(run(backend, folder, checkpointing_steps=every), expected)
    return folder


def check(backend, expected, saved, folder, stop, workers, again=None):
    """Goes on from a checkpoint; where asked to, stops again and goes on once more."""
    if stop:
        shutil.copytree(saved / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
    (folder / f"checkpoint-{stop + 1}.partial.orbax-checkpoint-tmp").mkdir(parents=True)
    options = {"resume_from_checkpoint": "latest", "checkpointing_steps": STEPS, "dataloader_num_workers": workers}
    if again is not None:
        run(backend, folder, until=again, **options)
    assert_same(run(backend, folder, **options), expected)


@pytest.mark.parametrize(("stop", "workers"), [(4, 2), (STEPS, 0)])
def test_resume_is_bitwise(backend, uninterrupted, saved, tmp_path, stop, workers):
    check(backend, uninterrupted, saved, tmp_path, stop, workers)


@pytest.mark.acceptance
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bitwise_at_every_step(backend, uninterrupted, all_saved, tmp_path, workers, figure):
    """And twice in a row."""
    for stop in range(STEPS + 1):
        check(backend, uninterrupted, all_saved, tmp_path / str(stop), stop, workers)
        again = stop + 1 + stop % 3
        if again < STEPS:
            check(backend, uninterrupted, all_saved, tmp_path / f"{stop}, {again}", stop, workers, again)
    figure(
        2,
        f"{backend}, {workers} workers: stopped at each of steps 0 to {STEPS}, and again soon after: bitwise the same",
    )


@pytest.mark.acceptance
def test_resume_with_cached_latents(backend, tmp_path):
    """They are made anew at each start, of both orientations; a resumed run draws from them what it would have."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(**VAE | {"in_channels": 1, "out_channels": 1}).save_pretrained(tmp_path / "vae")
    unet = CONFIG["unet"] | {"in_channels": 4, "out_channels": 4}
    options = {"vae": str(tmp_path / "vae"), "cache_latents": True, "center_crop": True, "unet": unet}
    options |= {"max_train_samples": 12, "max_train_steps": 6, "checkpointing_steps": 6}
    whole = run(backend, tmp_path / "whole", **options)
    run(backend, tmp_path / "part", 2, **options)
    assert_same(run(backend, tmp_path / "part", resume_from_checkpoint="latest", **options), whole)


def every_moment(backend, work, seen, kind):
    """Runs `work`, and calls `seen` before each "line" or "opcode" of Python's in the backend's own file meanwhile."""
    file = inspect.getsourcefile(type(backend))
    moments = 0

    def trace(frame, event, argument):
        nonlocal moments
        if frame.f_code.co_filename != file:
            return None
        frame.f_trace_opcodes = kind == "opcode"
        if event == kind:
            moments += 1
            sys.settrace(None)
            seen()
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return moments


@pytest.mark.parametrize("kind", ["line", pytest.param("opcode", marks=pytest.mark.acceptance)])
@pytest.mark.parametrize("what", ["sample", "export"])
def test_what_would_be_saved_is_right_at_every_moment(backend, tmp_path, what, kind):
    """While it samples or exports with the average, the state is that of the training."""
    config = UnconditionalConfig(output_dir=str(tmp_path / "run"), **CONFIG | {"max_train_steps": 2})
    made = []

    def make(config, spec):
        made.append(BACKENDS[backend](config, spec))
        return made[-1]

    fit(task_of(config), make)
    own = made[0]
    expected = own.state_arrays()
    averages = [name for name in expected if name.startswith("ema/")]
    assert any((expected[name] != expected[name.replace("ema/", "params/")]).any() for name in averages)

    def same():
        for name, array in own.state_arrays().items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)

    def sample():
        own.sample(prompts=[], num_images=1, num_inference_steps=1, guidance_scale=1.0, seed=0)

    work = {"sample": sample, "export": lambda: own.export(tmp_path / "out")}[what]
    work()  # once before, so that nothing is compiled meanwhile
    assert every_moment(own, work, same, kind) > {"line": 5, "opcode": 50}[kind]


def test_repeating_a_step_draws_its_dropout(backend, tmp_path, caplog):
    """The loss of step 6, from the weights of step 4 and from those of step 5, with a rate that keeps them the same."""
    options = {"learning_rate": 1e-30, "checkpointing_steps": 1, "max_train_steps": 6, "gradient_accumulation_steps": 1}
    caplog.set_level("INFO")
    run(backend, tmp_path, until=6, **options)
    said = []
    for step in (4, 5):
        caplog.clear()
        config = CONFIG | options | {"resume_from_checkpoint": f"checkpoint-{step}", "repeat_step": 6}
        fit(task_of(UnconditionalConfig(output_dir=str(tmp_path), **config)), BACKENDS[backend])
        said.append(re.search(r"loss ([\d.e-]+)", caplog.text)[1])
    assert said[0] == said[1]
