"""Runs push their results to the Hub beside training: what arrives, what stays at home, and what happens when it fails.

The Hub is a server in this process.
"""

import numpy as np
import pytest
from fake_hub import Hub
from recorder import Idle
from safetensors.numpy import save_file
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.run.hub import pusher
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.task import task_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # by the Hub's client, of its own calls


class Recorder(Idle):
    """Counts steps, and exports their number."""

    steps = 0

    def __init__(self, config, spec):
        self.spec = spec

    def put(self, batch):
        return batch

    def train_step(self, batch, learning_rate, ema_decays):
        self.steps += 1
        return {"loss": 1.0, "grad_norm": 1.0}

    def save(self, folder, metadata):
        folder.mkdir()
        (folder / "state").write_text(str(self.steps))

    def sample(self, **asked):
        return np.zeros((asked["num_images"], 8, 8, 1), np.uint8)

    def export(self, folder, *, only_trained=False):
        for name in self.spec.components:
            (folder / name).mkdir(exist_ok=True, parents=True)
            (folder / name / "config.json").write_text(f'{{"step": {self.steps}}}')
            save_file({"x": np.full(9, self.steps)}, folder / name / "diffusion_pytorch_model.safetensors")


OPTIONS = RUN | {
    "unet": UNET | ONE_BLOCK, "max_train_steps": 4, "train_batch_size": 20, "checkpointing_steps": 2,
    "validation_epochs": None, "save_model_epochs": None, "push_to_hub": True,
}  # fmt: skip
"""A run of two epochs."""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(pusher, "DELAYS", (0.0, 0.0))
    with Hub() as served:
        yield served.use(monkeypatch)
        assert not served.unknown


def config(folder, **options):
    return command_line.merge("unconditional", {}, OPTIONS | {"output_dir": str(folder)} | options, "")


def run(folder, backend=Recorder, preemption=None, **options):
    """A run whose backend computes nothing."""
    return fit(task_of(config(folder, **options)), backend, preemption)


def test_what_arrives(hub, tmp_path):
    folder = run(tmp_path / "my-model", save_model_epochs=1)
    files = hub.files["me/my-model"]
    assert {"README.md", "config.yaml", "model_index.json", "unet/config.json", "samples/00000004.png"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoint", "logs", "precomputed", "."))]
    assert [message for message, _ in hub.commits][-1] == "Step 4"
    for name, content in files.items():
        assert (folder / name).read_bytes() == content, name
    assert not (folder / pusher.STAGE).exists()
    assert hub.private == {"me/my-model": False}


def test_names_and_privacy(hub, tmp_path):
    run(tmp_path / "a", hub_model_id="mine")
    run(tmp_path / "b", hub_model_id="me/ours", hub_private_repo=True)
    assert hub.private == {"me/mine": False, "me/ours": True}
