"""Objectives of the user's own that bring a loss, and samples: what the loss is given, what trains, who draws."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives.objective import OBJECTIVES, find
from flax_diffusion.generate import generate
from flax_diffusion.train import train
from torch_backend.generate import generate as torch_generate
from torch_backend.train import train as torch_train

OWN = '''
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_diffusion.core.objectives.flow_matching import FlowMatching
from flax_diffusion.core.objectives.objective import Objective


class Drawn(NamedTuple):
    time: np.ndarray
    loss_weights: np.ndarray


class Own(Objective):
    """Flow matching, written as a loss."""

    name, schedulers = "own", ("OwnScheduler",)

    def draw(self, rng):
        return Drawn(np.float32(rng.random()), np.float32(1))

    def loss(self, model, batch, key):
        clean, noise, t = batch["clean"], batch["noise"], batch["time"]
        assert key.shape == ()
        assert clean.shape == noise.shape == (len(t), 1, 8, 8)
        wide = t[:, None, None, None]
        x = (1 - wide) * clean + wide * noise
        return jnp.square(model(x, 1000 * t) - (noise - clean)).mean((1, 2, 3))

    def sample(self, model, noise):
        x = noise[0]
        for step in range(len(noise)):
            t = 1 - step / len(noise)
            x = x - model(x, jnp.full(len(x), 1000 * t)) / len(noise)
        return x


class Curved(Own):
    """The derivative along the path is in the loss too, so that its gradient goes through `jax.jvp`."""

    name, schedulers = "curved", ("CurvedScheduler",)

    def loss(self, model, batch, key):
        t = batch["time"]
        out, change = jax.jvp(model, (batch["noise"], t), (batch["clean"], jnp.ones_like(t)))
        return jnp.square(out).mean((1, 2, 3)) + 1e-3 * jnp.square(change).mean((1, 2, 3))


class Scalar(Own):
    name, schedulers = "scalar", ("ScalarScheduler",)

    def loss(self, model, batch, key):
        return jnp.zeros(())


class Sampleless(FlowMatching):
    name, schedulers = "sampleless", ("SamplelessScheduler",)

    def loss(self, model, batch, key):
        return batch["loss_weights"]


class Taken(Own):
    name, schedulers = "taken", ("EDMEulerScheduler",)
'''
NAMES = ("own", "curved", "scalar", "sampleless", "taken")


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_losses", None)
    for name in NAMES:
        OBJECTIVES._load().pop(name, None)


def trained(folder, objective, by=train, **options):
    small = RUN | {"unet": UNET | ONE_BLOCK, "max_train_steps": 3, "report_to": "none", "draw_samples": False}
    return by("unconditional", **small | options, objective=objective, output_dir=str(folder))


def validation_losses(run):
    return [json.loads(line)["validation_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_loss_of_ones_own_trains_as_ours_does_and_draws(tmp_path):
    """Flow matching written as a loss ends at the same weights; its samples are those that it says."""
    own, ours = (trained(tmp_path / name, name, validation_split=0.01) for name in ("my_losses:Own", "flow_matching"))
    assert validation_losses(own) == pytest.approx(validation_losses(ours), rel=1e-5)
    first, second = (load_file(run / "unet/diffusion_pytorch_model.safetensors") for run in (own, ours))
    for name, array in first.items():
        if not name.endswith("to_k.bias"):  # whose gradient is 0 but for rounding, which Adam makes large
            np.testing.assert_allclose(array, second[name], atol=1e-5, err_msg=name)
    options = {"num_images": 3, "num_inference_steps": 4, "seed": 1}
    drawn = generate(own, objective="my_losses:Own", **options)
    assert drawn.std() > 1
    one_by_one = generate(own, objective="my_losses:Own", **options, batch_size=1)
    assert np.abs(drawn.astype(int) - one_by_one).max() <= 1
    for name in NAMES:
        OBJECTIVES._load().pop(name, None)
    with pytest.raises(ConfigError, match=r"scheduler OwnScheduler: is not among .*give --objective module:Class"):
        generate(own, **options)
    for options, says in (
        ({"scheduler": "euler"}, "--scheduler euler: this model was trained by own, which draws by its own sample"),
        ({"guidance_interval": [0, 1]}, "--guidance_interval: own draws by its own sample, all of it; drop it"),
    ):
        with pytest.raises(ConfigError, match=says):
            generate(own, objective="my_losses:Own", **options)
    with pytest.raises(ConfigError, match="--objective my_losses:Own: this model was trained by flow_matching; name"):
        generate(ours, objective="my_losses:Own")
    with pytest.raises(ConfigError, match="--objective own: its loss and its samples are written in JAX: use python"):
        torch_generate(own, objective="my_losses:Own")


def test_a_loss_may_have_derivatives(tmp_path):
    before = trained(tmp_path / "before", "my_losses:Curved", max_train_steps=1)
    after = trained(tmp_path / "after", "my_losses:Curved")
    first, second = (load_file(run / "unet/diffusion_pytorch_model.safetensors") for run in (before, after))
    assert all(np.isfinite(array).all() for array in second.values())
    assert any((array != second[name]).any() for name, array in first.items())


def test_what_pytorch_refuses(tmp_path):
    with pytest.raises(ConfigError, match="--objective own: its loss and its samples are written in JAX"):
        trained(tmp_path / "run", "my_losses:Own", by=torch_train)
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Sampleless", "Sampleless has a method loss and no sample; add it"),
        (
            "Taken",
            "Taken draws by its own sample, and models of EDMEulerScheduler are those of edm: put a name of its own",
        ),
    ],
)
def test_objectives_that_do_not_go_together(name, says):
    with pytest.raises(ConfigError, match=says):
        find(f"my_losses:{name}")


def test_losses_are_those_of_examples(tmp_path):
    with pytest.raises(ConfigError, match=r"the loss of scalar has shape \(\); it must be that of .* \(8,\): take the"):
        trained(tmp_path / "run", "my_losses:Scalar")
