"""A run that was stopped ends bit for bit as one that was not."""

import shutil

import jax
import numpy as np
import pytest
from tiny import RUN

from flax_diffusion.backend import JaxBackend
from flax_diffusion.core.config import UnconditionalConfig
from flax_diffusion.core.loop import fit

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


def run(folder, **options):
    """Trains and returns every array of the final state."""
    made = []

    def make(config, spec):
        made.append(JaxBackend(config, spec, jax.devices()[:1]))
        return made[-1]

    fit("unconditional", UnconditionalConfig(output_dir=str(folder), **CONFIG | options), make)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(made[-1].state))]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The final state of a run never stopped, and a folder with its checkpoints of every step."""
    folder = tmp_path_factory.mktemp("every")
    every = run(folder, checkpointing_steps=1)
    never = run(tmp_path_factory.mktemp("never"), checkpointing_steps=STEPS)
    for a, b in zip(every, never, strict=True):
        np.testing.assert_array_equal(a, b)
    return never, folder


def check(uninterrupted, tmp_path, stop, workers):
    expected, every = uninterrupted
    shutil.copytree(every / f"checkpoint-{stop}", tmp_path / f"checkpoint-{stop}")
    (tmp_path / f"checkpoint-{stop + 1}.orbax-checkpoint-tmp").mkdir()
    final = run(tmp_path, resume_from_checkpoint="latest", checkpointing_steps=STEPS, dataloader_num_workers=workers)
    assert len(final) == len(expected)
    for a, b in zip(final, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (4, 0), (7, 2), (10, 0)])
def test_resume_is_bitwise(uninterrupted, tmp_path, stop, workers):
    check(uninterrupted, tmp_path, stop, workers)


@pytest.mark.acceptance
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", range(1, 11))
def test_resume_is_bitwise_at_every_step(uninterrupted, tmp_path, stop, workers):
    check(uninterrupted, tmp_path, stop, workers)


def test_a_finished_run_resumes_to_its_end(uninterrupted, tmp_path):
    check(uninterrupted, tmp_path, STEPS, 0)


def test_progress_is_counted_in_examples_when_the_batch_changes(uninterrupted, tmp_path, monkeypatch):
    _, every = uninterrupted
    shutil.copytree(every / "checkpoint-4", tmp_path / "checkpoint-4")
    seen = []
    original = JaxBackend.put
    monkeypatch.setattr(
        JaxBackend, "put", lambda self, batch: seen.append(batch["example_index"]) or original(self, batch)
    )
    run(tmp_path, resume_from_checkpoint="latest", train_batch_size=4, max_train_steps=6)
    smaller = np.concatenate([part.ravel() for part in seen])
    seen.clear()
    run(tmp_path / "other", max_train_steps=6)
    whole = np.concatenate([part.ravel() for part in seen])
    np.testing.assert_array_equal(smaller, whole[4 * 16 : 4 * 16 + len(smaller)])
