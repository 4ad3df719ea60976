"""Karras VE and score SDE VE against PyTorch's classes, part by part, and LMS where nothing else looks."""

from __future__ import annotations

import importlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import SHAPE

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers import FlaxKarrasVeScheduler, FlaxLMSDiscreteScheduler, FlaxScoreSdeVeScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct:UserWarning"),
]


def arrays(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.standard_normal(SHAPE, np.float32) for _ in range(count)]


def close(actual, expected, rtol: float = 1e-6) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=rtol * np.abs(expected).max())


def karras_ve():
    module = importlib.import_module("diffusers.schedulers.deprecated.scheduling_karras_ve")
    return module, module.KarrasVeScheduler()


def test_karras_ve_is_pytorchs(monkeypatch) -> None:
    module, theirs = karras_ve()
    ours = FlaxKarrasVeScheduler()
    theirs.set_timesteps(10)
    state = ours.set_timesteps(ours.create_state(), 10, SHAPE)
    np.testing.assert_array_equal(state.timesteps, theirs.timesteps.numpy())
    np.testing.assert_allclose(state.schedule, theirs.schedule.numpy(), rtol=2e-6)  # PyTorch's float32 power
    # In float64, since PyTorch's class adds σ·output to the sample, takes the sample away, and divides by σ.
    x, out, again, noise = (array.astype(np.float64) for array in arrays(4))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(noise))
    with jax.enable_x64(True):
        wide = FlaxKarrasVeScheduler(dtype=jnp.float64)
        state = wide.set_timesteps(wide.create_state(), 10)
        for sigma, following in ((30.0, 20.0), (70.0, 60.0), (0.04, 0.03)):
            hat, level = theirs.add_noise_to_input(torch.from_numpy(x), sigma)
            our_hat, our_level = wide.add_noise_to_input(
                state, jnp.asarray(x), sigma, variance_noise=jnp.asarray(noise)
            )
            close(our_hat, hat, 1e-12)
            close(our_level, level, 1e-12)
            step = theirs.step(torch.from_numpy(out), level, following, hat)
            our_step = wide.step(state, jnp.asarray(out), our_level, following, our_hat)
            close(our_step.prev_sample, step.prev_sample, 1e-12)
            close(our_step.derivative, step.derivative, 1e-12)
            last = theirs.step_correct(
                torch.from_numpy(again), level, following, hat, step.prev_sample, step.derivative, return_dict=False
            )
            our_last = jax.jit(wide.step_correct, static_argnames="return_dict")(
                state,
                again,
                our_level,
                following,
                our_hat,
                our_step.prev_sample,
                our_step.derivative,
                return_dict=False,
            )
            assert type(our_last) is tuple
            close(our_last[0], last[0], 1e-12)
            close(our_last[1], last[1], 1e-12)


@pytest.mark.parametrize("steps", [None, 7, 1000])
def test_score_sde_ve_is_pytorchs(monkeypatch, steps: int | None) -> None:
    module = importlib.import_module("diffusers.schedulers.scheduling_sde_ve")
    theirs, ours = diffusers.ScoreSdeVeScheduler(), FlaxScoreSdeVeScheduler()
    state = ours.create_state()
    if steps is not None:
        theirs.set_timesteps(steps)
        theirs.set_sigmas(steps)
        state = ours.set_sigmas(ours.set_timesteps(state, steps), steps)
    np.testing.assert_array_equal(state.timesteps, theirs.timesteps.numpy())
    np.testing.assert_allclose(state.discrete_sigmas, theirs.discrete_sigmas.numpy(), rtol=2e-6)
    np.testing.assert_allclose(state.sigmas, theirs.sigmas.numpy(), rtol=2e-6)
    x, out, noise = arrays(3)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(noise))
    given = {"variance_noise": jnp.asarray(noise)}
    predict = jax.jit(ours.step_pred)
    # PyTorch's float32 levels are off by 1e-6, which the difference of two neighbours of them magnifies.
    theirs.discrete_sigmas = torch.from_numpy(np.array(state.discrete_sigmas))
    for place in range(0, len(theirs.timesteps), max(1, len(theirs.timesteps) // 20)):
        t = theirs.timesteps[place]
        expected = theirs.step_pred(torch.from_numpy(out), t, torch.from_numpy(x))
        actual = predict(state, out, state.timesteps[place], x, **given)
        close(actual.prev_sample, expected.prev_sample, 2e-5)
        close(actual.prev_sample_mean, expected.prev_sample_mean, 2e-5)
    expected = theirs.step_correct(torch.from_numpy(out), torch.from_numpy(x))
    close(ours.step_correct(state, jnp.asarray(out), jnp.asarray(x), **given).prev_sample, expected.prev_sample)
    places = np.array([0, 5])
    expected = theirs.add_noise(torch.from_numpy(x), torch.from_numpy(noise), torch.from_numpy(places))
    close(ours.add_noise(state, jnp.asarray(x), jnp.asarray(noise), places), expected)
    np.testing.assert_array_equal(
        ours.get_adjacent_sigma(state, places, jnp.ones(2)), [0, np.asarray(state.discrete_sigmas)[4]]
    )


def test_a_key_draws_the_noise() -> None:
    x, out = (jnp.asarray(a) for a in arrays(2))
    key = jax.random.key(0)
    noise = jax.random.normal(key, SHAPE)
    karras = FlaxKarrasVeScheduler()
    state = karras.set_timesteps(karras.create_state(), 5)
    drawn, given = (
        karras.add_noise_to_input(state, x, 10.0, key),
        karras.add_noise_to_input(state, x, 10.0, variance_noise=noise),
    )
    np.testing.assert_array_equal(drawn[0], given[0])
    score = FlaxScoreSdeVeScheduler()
    state = score.create_state()
    drawn, given = score.step_correct(state, out, x, key), score.step_correct(state, out, x, variance_noise=noise)
    np.testing.assert_array_equal(drawn.prev_sample, given.prev_sample)
    previous, mean, same = score.step_pred(state, out, state.timesteps[3], x, key, return_dict=False)
    assert same is state
    assert previous.shape == mean.shape == SHAPE


def test_lms_coefficients_are_pytorchs() -> None:
    theirs, ours = diffusers.LMSDiscreteScheduler(), FlaxLMSDiscreteScheduler()
    theirs.set_timesteps(10)
    theirs.sigmas = theirs.sigmas.double()
    state = ours.set_timesteps(ours.create_state(), 10, SHAPE)
    for order, t, age in ((1, 0, 0), (2, 1, 1), (4, 9, 3), (5, 6, 2)):
        expected = theirs.get_lms_coefficient(order, t, age)
        assert abs(ours.get_lms_coefficient(state, order, t, age) - expected) <= 1e-6 * abs(expected)


def _lms(order: int):
    scheduler = FlaxLMSDiscreteScheduler()
    x = jnp.ones(SHAPE)
    return scheduler.step(scheduler.set_timesteps(scheduler.create_state(), 5, SHAPE), x, 999, x, order)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _lms(5), "order is 5; it must lie between 1 and 4"),
        (lambda: _lms(0), "order is 0"),
        (lambda: FlaxKarrasVeScheduler(sigma_min=3, sigma_max=2), "the first the smaller"),
        (lambda: FlaxKarrasVeScheduler().set_timesteps(FlaxKarrasVeScheduler().create_state(), 1), "at least 2"),
        (lambda: FlaxKarrasVeScheduler().add_noise(None, 1, 1, 1), "has no add_noise"),
        (
            lambda: FlaxKarrasVeScheduler().add_noise_to_input(FlaxKarrasVeScheduler().create_state(), 1, 1),
            "call set_timesteps",
        ),
        (lambda: FlaxScoreSdeVeScheduler(sigma_min=-1.0), "above 0"),
        (
            lambda: FlaxScoreSdeVeScheduler().step_correct(
                FlaxScoreSdeVeScheduler().create_state(), jnp.ones(SHAPE), jnp.ones(SHAPE)
            ),
            "step_correct needs noise: neither",
        ),
    ],
)
def test_errors(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
