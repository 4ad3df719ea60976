"""Flow matching's Euler sampler against PyTorch's: whole trajectories, schedules, noise, mistakes."""

from __future__ import annotations

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import flax_trajectory, make, relative, torch_trajectory

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers import FlaxFlowMatchEulerDiscreteScheduler

NAME = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True}
CASES = [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"shift": 0.5, "num_train_timesteps": 50}, {}),
    ({"shift": 3.0, "shift_terminal": 0.1}, {}),
    (DYNAMIC, {"mu": 0.8}),
    (DYNAMIC | {"time_shift_type": "linear", "shift_terminal": 0.02}, {"mu": 1.7}),
    ({"invert_sigmas": True}, {}),
    ({"use_karras_sigmas": True}, {}),
    ({"use_exponential_sigmas": True, "shift": 2.0}, {}),
    ({"use_beta_sigmas": True} | DYNAMIC, {"mu": 0.5}),
    ({"stochastic_sampling": True, "shift": 3.0}, {}),
    ({"shift": 3.0}, {"sigmas": [1.0, 0.7, 0.4, 0.1]}),
    ({"shift": 3.0}, {"timesteps": [1000.0, 600.0, 250.0]}),
    (DYNAMIC, {"sigmas": [0.9, 0.5, 0.2], "timesteps": [900.0, 500.0, 100.0], "mu": 1.0}),
]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(("config", "schedule"), CASES)
def test_trajectory(config, schedule, scan):
    steps = None if {"sigmas", "timesteps"} & schedule.keys() else 10
    theirs = torch_trajectory(make(NAME, **config), steps, False, schedule=schedule)
    ours = flax_trajectory(FlaxFlowMatchEulerDiscreteScheduler(**config), steps, scan=scan, schedule=schedule)
    assert relative(ours, theirs) < 1e-6
    with jax.enable_x64(True):
        theirs = torch_trajectory(make(NAME, **config), steps, True, schedule=schedule)
        wide = FlaxFlowMatchEulerDiscreteScheduler(**config, dtype=jnp.float64)
        assert relative(flax_trajectory(wide, steps, scan=scan, schedule=schedule), theirs) < 1e-12


@pytest.mark.parametrize(("config", "schedule"), CASES)
def test_schedule_is_the_same_to_the_bit(config, schedule):
    steps = None if {"sigmas", "timesteps"} & schedule.keys() else 10
    theirs, ours = make(NAME, **config), FlaxFlowMatchEulerDiscreteScheduler(**config)
    first = ours.create_state()
    np.testing.assert_array_equal(first.timesteps, theirs.timesteps.numpy())
    theirs.set_timesteps(steps, **schedule)
    state = ours.set_timesteps(first, steps, **schedule)
    np.testing.assert_array_equal(state.sigmas, theirs.sigmas.numpy())
    np.testing.assert_array_equal(state.timesteps, theirs.timesteps.numpy())


def test_noise_and_velocity():
    theirs, ours = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), FlaxFlowMatchEulerDiscreteScheduler(shift=3.0)
    state = ours.create_state()
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 2, 4, 4)).astype(np.float32)
    steps = theirs.timesteps[[0, 500, 999]]
    expected = theirs.scale_noise(torch.from_numpy(x0), steps, torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(ours.scale_noise(state, x0, jnp.asarray(steps.numpy()), noise), expected, atol=1e-6)
    np.testing.assert_array_equal(ours.get_velocity(state, x0, noise, 0), noise - x0)
    with pytest.raises(ConfigError, match=r"timestep 3\.14.* is not in the schedule; pass entries of state\.timesteps"):
        ours.add_noise(state, x0, noise, 3.14)


def test_the_true_velocity_ends_at_the_clean_sample():
    ours = FlaxFlowMatchEulerDiscreteScheduler(shift=3.0)
    state = ours.set_timesteps(ours.create_state(), 5)
    x0, noise = np.random.default_rng(0).standard_normal((2, 1, 2, 4, 4)).astype(np.float32)
    sample = jnp.asarray(noise)
    for timestep in state.timesteps:
        sample, state = ours.step(state, noise - x0, timestep, sample)
    np.testing.assert_allclose(sample, x0, atol=1e-5)


def test_configs_go_both_ways(tmp_path):
    ours = FlaxFlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    ours.save_pretrained(tmp_path)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert theirs.config.shift == 3.0
    assert FlaxFlowMatchEulerDiscreteScheduler.from_config(dict(theirs.config)) == ours
    again, state = FlaxFlowMatchEulerDiscreteScheduler.from_pretrained(str(tmp_path))
    assert again == ours
    assert state.timesteps.shape == (1000,)


@pytest.mark.parametrize(
    ("config", "schedule", "says"),
    [
        ({"shift": 0.0}, {}, r"shift is 0\.0; it must be greater than 0"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "noise levels can be spaced in one way only"),
        ({"time_shift_type": "cubic"}, {}, "time_shift_type is 'cubic'"),
        (DYNAMIC, {"num_inference_steps": 4}, "use_dynamic_shifting needs mu, which is None"),
        ({}, {}, "must say one number of steps, at least 1: they say none"),
        ({}, {"num_inference_steps": 0}, "at least 1: they say 0"),
        ({}, {"num_inference_steps": 4, "sigmas": [1.0, 0.5]}, "they say 2, 4"),
    ],
)
def test_mistakes(config, schedule, says):
    with pytest.raises(ConfigError, match=says):
        FlaxFlowMatchEulerDiscreteScheduler(**config).set_timesteps(None, **schedule)  # pyright: ignore


def test_a_step_needs_timesteps():
    ours = FlaxFlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="no timesteps are set"):
        ours.step(ours.create_state(), jnp.ones(1), 1000, jnp.ones(1))
