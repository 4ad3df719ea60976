"""A run that was stopped ends bit for bit as one that was not."""

import shutil

import jax
import numpy as np
import pytest
from tiny import RUN

from flax_diffusion.backend import JaxBackend
from flax_diffusion.core.loop import fit
from flax_diffusion.core.tasks import UnconditionalConfig

STEPS = 20
CONFIG = RUN | {
    "max_train_steps": STEPS,
    "use_ema": True,
    "noise_offset": 0.1,
    "random_flip": True,
    "gradient_accumulation_steps": 2,
    "validation_epochs": None,
    "save_model_epochs": None,
    "unet": RUN["unet"] | {"dropout": 0.1},
    "report_to": "none",
}


def run(folder, until=None, **options):
    """Trains, where asked to no further than some step, and returns every array of the final state."""
    made = []

    def make(config, spec):
        made.append(JaxBackend(config, spec, jax.devices()[:1]))
        if until is not None:
            made[-1].stops = lambda wanted, step: step == until
        return made[-1]

    fit("unconditional", UnconditionalConfig(output_dir=str(folder), **CONFIG | options), make)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(made[-1].state))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The final state of a run that saved nothing before its end."""
    return run(tmp_path_factory.mktemp("never"), checkpointing_steps=STEPS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, uninterrupted):
    """A folder with checkpoints 4, 8, … of the same run."""
    return checkpoints_of_a_run(tmp_path_factory.mktemp("some"), uninterrupted, 4)


@pytest.fixture(scope="module")
def all_saved(tmp_path_factory, uninterrupted):
    """A folder with the checkpoint of every step of the same run."""
    return checkpoints_of_a_run(tmp_path_factory.mktemp("every"), uninterrupted, 1)


def checkpoints_of_a_run(folder, expected, every):
    assert_same(run(folder, checkpointing_steps=every), expected)
    return folder


def assert_same(final, expected):
    assert len(final) == len(expected)
    for a, b in zip(final, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def check(expected, saved, tmp_path, stop, workers, again=None):
    """Goes on from a checkpoint; where asked to, stops again and goes on once more."""
    if stop:
        shutil.copytree(saved / f"checkpoint-{stop}", tmp_path / f"checkpoint-{stop}")
    (tmp_path / f"checkpoint-{stop + 1}.partial.orbax-checkpoint-tmp").mkdir()
    options = {"resume_from_checkpoint": "latest", "checkpointing_steps": STEPS, "dataloader_num_workers": workers}
    if again is not None:
        run(tmp_path, until=again, **options)
        assert (tmp_path / f"checkpoint-{again}").is_dir()
    assert_same(run(tmp_path, **options), expected)


@pytest.mark.parametrize(("stop", "workers"), [(4, 2), (STEPS, 0)])
def test_resume_is_bitwise(uninterrupted, saved, tmp_path, stop, workers):
    check(uninterrupted, saved, tmp_path, stop, workers)


@pytest.mark.acceptance
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_resume_is_bitwise_at_every_step(uninterrupted, all_saved, tmp_path, stop, workers):
    """And twice in a row."""
    again = stop + 1 + stop % 3
    check(uninterrupted, all_saved, tmp_path, stop, workers, again if again < STEPS else None)
