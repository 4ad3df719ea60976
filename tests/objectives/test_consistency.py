"""The example of an objective with a loss of its own, configs/consistency.py: its formulas, and a run by it."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import RUN

from flax_diffusion.core.objectives.objective import OBJECTIVES, find
from flax_diffusion.generate import generate
from flax_diffusion.train import train

MEAN, DEVIATION = 0.7, 0.4
"""Of a Gaussian data distribution."""


@pytest.fixture
def name(request, monkeypatch):
    monkeypatch.syspath_prepend(request.config.rootpath / "configs")
    yield "consistency:Consistency"
    sys.modules.pop("consistency", None)
    OBJECTIVES._load().pop("consistency", None)


def test_the_loss_of_a_perfect_model_is_zero(name):
    """Where every path ends is known for Gaussian data; along the paths of the true velocity the loss is 0 there."""
    objective = find(name)(np.float64)
    told = sys.modules["consistency"].TOLD

    def spread(t):
        return jnp.sqrt((1 - t) ** 2 * DEVIATION**2 + t**2)

    def model(x, time):
        t = (time / told)[:, None, None, None]
        return (x - MEAN - DEVIATION / spread(t) * (x - (1 - t) * MEAN)) / t

    with jax.enable_x64(True):
        x, noise = np.random.default_rng(0).standard_normal((2, 5, 1, 2, 2))
        t = np.array([0.1, 0.3, 0.5, 0.8, 1.0])
        wide = t[:, None, None, None]
        far = (x - (1 - wide) * MEAN) / spread(wide) ** 2
        velocity = wide * far - MEAN - (1 - wide) * DEVIATION**2 * far
        batch = {"clean": x - wide * velocity, "noise": x + (1 - wide) * velocity, "time": jnp.asarray(t)}
        assert objective.loss(model, batch, None).max() < 1e-20
        wrong = objective.loss(lambda x, t: model(x, t) + 0.1, batch, None)
        assert wrong.min() > 0.5
        np.testing.assert_allclose(objective.sample(model, jnp.asarray([noise])), MEAN + DEVIATION * noise, rtol=1e-12)


def test_a_run(name, tmp_path):
    dit = {"in_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    values = RUN | {"unet": None, "transformer": dit, "report_to": "none", "max_train_steps": 3}
    out = train("class_conditional", **values, objective=name, output_dir=str(tmp_path / "run"))
    for steps in (1, 2):
        drawn = generate(out, objective=name, class_label=["3", "7"], num_inference_steps=steps, guidance_scale=2.0)
        assert drawn.shape == (2, 8, 8, 1)
