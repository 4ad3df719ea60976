"""A run that was stopped ends bit for bit as one that was not."""

import shutil

import numpy as np
import pytest
from tiny import ONE_BLOCK, RUN

from flax_diffusion.backend import JaxBackend
from flax_diffusion.core import portable
from flax_diffusion.core.loop import fit
from flax_diffusion.core.tasks import UnconditionalConfig
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
            made.stops = lambda wanted, step: step == until
        return made

    fit("unconditional", UnconditionalConfig(output_dir=str(folder), **CONFIG | options), make)
    return portable.read(folder / f"checkpoint-{until or STEPS}")


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
