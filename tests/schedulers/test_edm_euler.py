"""EDM's Euler sampler against PyTorch's: whole trajectories, schedules, noise, mistakes."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import flax_trajectory, make, relative, torch_trajectory

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives.edm import Edm
from flax_diffusion.schedulers import FlaxEDMEulerScheduler

NAME = "EDMEulerScheduler"
CASES = [
    {},
    {"sigma_schedule": "exponential"},
    {"prediction_type": "v_prediction", "sigma_data": 1.0},
    {"final_sigmas_type": "sigma_min", "rho": 3.0},
    {"sigma_min": 0.1, "sigma_max": 10.0, "num_train_timesteps": 50},
]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("config", CASES)
def test_trajectory(config, scan):
    theirs = torch_trajectory(make(NAME, **config), 10, False)
    ours = flax_trajectory(FlaxEDMEulerScheduler(**config), 10, scan=scan)
    assert relative(ours, theirs) < 1e-6
    if config.get("sigma_schedule") == "exponential":  # PyTorch's float32 exponential is off in the last place
        return
    with jax.enable_x64(True):
        theirs = torch_trajectory(make(NAME, **config), 10, True)
        wide = FlaxEDMEulerScheduler(**config, dtype=jnp.float64)
        assert relative(flax_trajectory(wide, 10, scan=scan), theirs) < 1e-12


@pytest.mark.parametrize("config", CASES)
def test_schedule(config):
    """To the bit, but for the exponentials and logarithms of PyTorch, which are off by one unit in the last place."""
    theirs, ours = make(NAME, **config), FlaxEDMEulerScheduler(**config)
    state = ours.create_state()
    np.testing.assert_allclose(state.timesteps, theirs.timesteps.numpy(), rtol=1e-6, atol=1e-7)
    theirs.set_timesteps(10)
    state = ours.set_timesteps(state, 10)
    np.testing.assert_allclose(state.sigmas, theirs.sigmas.numpy(), rtol=1e-6)
    np.testing.assert_allclose(state.timesteps, theirs.timesteps.numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state.init_noise_sigma, theirs.init_noise_sigma, rtol=1e-7)


def test_noise_and_target():
    theirs, ours = diffusers.EDMEulerScheduler(), FlaxEDMEulerScheduler()
    state = ours.create_state()
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 2, 4, 4)).astype(np.float32)
    places = [0, 500, 999]
    expected = theirs.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), theirs.timesteps[places]).numpy()
    np.testing.assert_allclose(
        ours.add_noise(state, x0, noise, state.timesteps[jnp.asarray(places)]), expected, rtol=1e-5
    )
    mixture = Edm(dtype=np.float64).at(float(state.sigmas[500]))
    target = mixture.target_clean * x0 + mixture.target_noise * noise
    np.testing.assert_allclose(ours.get_velocity(state, x0, noise, state.timesteps[500]), target, atol=1e-5)
    with pytest.raises(ConfigError, match="is not in the schedule"):
        ours.add_noise(state, x0, noise, 3.14)


def test_a_perfect_model_ends_at_the_clean_sample():
    ours = FlaxEDMEulerScheduler()
    state = ours.set_timesteps(ours.create_state(), 6)
    x0, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 4, 4)).astype(np.float32)
    sample = jnp.asarray(x0 + 80.0 * noise)
    for timestep, sigma in zip(state.timesteps, np.asarray(state.sigmas), strict=False):
        given = ours.scale_model_input(state, sample, timestep)
        np.testing.assert_allclose(given, sample / np.hypot(sigma, 0.5), rtol=1e-5)
        sample, state = ours.step(state, ours.get_velocity(state, x0, noise, timestep), timestep, sample)
    np.testing.assert_allclose(sample, x0, atol=1e-4)


def test_configs_go_both_ways(tmp_path):
    ours = FlaxEDMEulerScheduler(sigma_data=1.0)
    ours.save_pretrained(tmp_path)
    theirs = diffusers.EDMEulerScheduler.from_pretrained(tmp_path)
    assert FlaxEDMEulerScheduler.from_config(dict(theirs.config)) == ours


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"sigma_min": 0.0}, r"sigma_min is 0\.0 and sigma_max 80\.0; they must be above 0"),
        ({"sigma_data": 0.0}, r"sigma_data is 0\.0; it must be greater than 0"),
        ({"sigma_schedule": "linear"}, "sigma_schedule is 'linear'"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type is 'one'"),
    ],
)
def test_mistakes(config, says):
    with pytest.raises(ConfigError, match=says):
        FlaxEDMEulerScheduler(**config)


def test_steps_are_needed():
    ours = FlaxEDMEulerScheduler()
    with pytest.raises(ConfigError, match="num_inference_steps is 0; it must be at least 1"):
        ours.set_timesteps(ours.create_state(), 0)
    with pytest.raises(ConfigError, match="no timesteps are set"):
        ours.step(ours.create_state(), jnp.ones(1), 1.0, jnp.ones(1))
