"""What an example carries of its objective, against Diffusers' schedulers."""

import pickle

import diffusers
import numpy as np
import pytest
import torch
from torch_reference import exact_roots

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives.ddpm import ddpm

T = 1000
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_input_and_target_of_every_timestep(schedule, prediction_type, dtype):
    """What Diffusers computes on the same numbers: bit for bit in float32, where its roots can be rounded correctly."""
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule)
    kind = torch.float32 if dtype == np.float32 else torch.float64
    theirs.alphas_cumprod = theirs.alphas_cumprod.to(kind)
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, T, 3)).astype(dtype)
    one = ddpm(theirs.alphas_cumprod.numpy(), prediction_type, dtype=dtype).tables
    tensors = torch.from_numpy(clean), torch.from_numpy(noise), torch.arange(T)
    with exact_roots():
        noisy, velocity = theirs.add_noise(*tensors), theirs.get_velocity(*tensors)
    target = {"epsilon": tensors[1], "sample": tensors[0], "v_prediction": velocity}[prediction_type]
    for ours, expected in (
        (one.input_clean[:, None] * clean + one.input_noise[:, None] * noise, noisy),
        (one.target_clean[:, None] * clean + one.target_noise[:, None] * noise, target),
    ):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=0 if dtype == np.float32 else 1e-15)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_clean_sample_comes_back(prediction_type):
    """From input and target, wherever there is signal and noise: x = (d · input - b · target) / (a · d - b · c)."""
    bar = np.linspace(0.99, 0.01, 50)
    a, b, c, d = ddpm(bar, prediction_type, dtype=np.float64).tables[1:5]
    x, noise = np.random.default_rng(0).standard_normal((2, 50))
    np.testing.assert_allclose((d * (a * x + b * noise) - b * (c * x + d * noise)) / (a * d - b * c), x, atol=1e-12)


def test_a_draw_is_a_row_of_the_tables():
    objective = pickle.loads(pickle.dumps(ddpm(np.linspace(0.9, 0.1, 5), "v_prediction", np.arange(5) / 7)))  # noqa: S301
    drawn = [objective.draw(np.random.default_rng(seed)) for seed in range(50)]
    assert {int(one.timesteps) for one in drawn} == set(range(5))
    for one in drawn:
        assert [value.shape for value in one] == [()] * 6
        assert [value.dtype.name for value in one] == ["int32", *["float32"] * 5]
        for value, table in zip(one, objective.tables, strict=True):
            assert value == table[one.timesteps]


def test_what_is_refused():
    with pytest.raises(ConfigError, match="prediction_type 'velocity' is unknown; use one of epsilon, v_pred"):
        ddpm(np.ones(3), "velocity")
    with pytest.raises(ValueError, match=r"loss_weights has shape \(999,\); it must be \(1000,\)"):
        ddpm(np.ones(1000), "epsilon", np.ones(999))
