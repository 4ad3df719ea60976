"""add_noise, get_velocity, noise from a key, half precision, starting in the middle, and wrong calls."""

from __future__ import annotations

from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import SHAPE, exact_roots, make

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers import (
    SCHEDULERS,
    FlaxDDIMScheduler,
    FlaxDDPMScheduler,
    FlaxDPMSolverMultistepScheduler,
    FlaxEulerDiscreteScheduler,
    FlaxPNDMScheduler,
)
from flax_diffusion.schedulers.common import BetaScheduler

# Diffusers turns tensors to arrays in a way NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

WITH_BETAS = [kind for kind, cls in SCHEDULERS.items() if issubclass(cls, BetaScheduler)]


def _pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal(SHAPE, np.float32), rng.standard_normal(SHAPE, np.float32)


@pytest.mark.parametrize("kind", WITH_BETAS)
def test_add_noise(kind: str) -> None:
    cls = SCHEDULERS[kind]
    reference, scheduler = make(cls.torch_class_name), cls()
    state = scheduler.create_state()
    if kind != "pndm":  # PyTorch's DPM-Solver has its noise levels in reverse before set_timesteps
        with exact_roots():
            reference.set_timesteps(20)
        state = scheduler.set_timesteps(state, 20, SHAPE)
        chosen = reference.timesteps[[3, 17]]
        np.testing.assert_array_equal(state.timesteps, reference.timesteps.numpy())
    else:
        chosen = torch.tensor([3, 700])
    x0, noise = _pair()
    with exact_roots():
        expected = reference.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), chosen).numpy()
    actual = jax.jit(scheduler.add_noise)(state, jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(chosen.numpy()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", WITH_BETAS)
def test_get_velocity(kind: str) -> None:
    """Every class agrees with PyTorch's DDPM, also where PyTorch's own class has none (PNDM, DPM) or errs (Euler)."""
    scheduler = SCHEDULERS[kind]()
    x0, noise = _pair()
    times = np.array([5, 993])
    reference = diffusers.DDPMScheduler()
    expected = reference.get_velocity(torch.from_numpy(x0), torch.from_numpy(noise), torch.from_numpy(times)).numpy()
    actual = scheduler.get_velocity(scheduler.create_state(), jnp.asarray(x0), jnp.asarray(noise), times)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_euler_velocity_in_pytorch_is_reversed() -> None:
    """Documents why ours does not follow it: it reads the table from the other end."""
    x0, noise = (torch.from_numpy(a) for a in _pair())
    times = torch.tensor([5.0, 993.0])
    theirs = diffusers.EulerDiscreteScheduler().get_velocity(x0, noise, times)
    reversed_times = diffusers.DDPMScheduler().get_velocity(x0, noise, torch.tensor([994, 6]))
    assert torch.equal(theirs, reversed_times)


def test_fixed_large_log_is_fixed_large() -> None:
    """PyTorch's returns NaN there."""
    x, noise = (jnp.asarray(a) for a in _pair())
    samples = []
    for name in ("fixed_large", "fixed_large_log"):
        scheduler = FlaxDDPMScheduler(variance_type=name)
        samples.append(scheduler.step(scheduler.create_state(), x, 500, x, variance_noise=noise).prev_sample)
    np.testing.assert_array_equal(*samples)


def test_key_draws_the_noise() -> None:
    scheduler = FlaxDDPMScheduler()
    state = scheduler.set_timesteps(scheduler.create_state(), 10)
    x, _ = (jnp.asarray(a) for a in _pair())
    key = jax.random.key(1)
    drawn, _ = scheduler.step(state, x, state.timesteps[2], x, key, return_dict=False)
    noise = jax.random.normal(jax.random.split(key, 1)[0], SHAPE)  # that of Diffusers 0.39
    given, _ = scheduler.step(state, x, state.timesteps[2], x, variance_noise=noise)
    np.testing.assert_array_equal(drawn, given)
    last = scheduler.step(state, x, 0, x, key).prev_sample
    np.testing.assert_array_equal(last, scheduler.step(state, x, 0, x, jax.random.key(2)).prev_sample)


def test_return_dict() -> None:
    scheduler = FlaxDDIMScheduler()
    state = scheduler.set_timesteps(scheduler.create_state(), 10)
    x = jnp.ones(SHAPE)
    plain = scheduler.step(state, x, 901, x, return_dict=False)
    named = scheduler.step(state, x, 901, x)
    assert type(plain) is tuple
    np.testing.assert_array_equal(plain[0], named.prev_sample)
    assert named.state is named[1]


@pytest.mark.parametrize("kind", WITH_BETAS)
def test_half_precision_is_rounded_once(kind: str) -> None:
    scheduler = SCHEDULERS[kind]()
    state = scheduler.set_timesteps(scheduler.create_state(), 10, SHAPE)
    x, noise = (jnp.asarray(a, jnp.bfloat16) for a in _pair())
    t = state.timesteps[0]
    half = scheduler.step(state, x, t, x, variance_noise=noise).prev_sample
    wide = [a.astype(jnp.float32) for a in (x, noise)]
    full = scheduler.step(state, wide[0], t, wide[0], variance_noise=wide[1]).prev_sample
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["euler", "dpm++"])
def test_start_in_the_middle(kind: str) -> None:
    """As image-to-image does: the first timestep is looked up, later ones are counted."""
    scheduler = SCHEDULERS[kind]()
    reference = make(scheduler.torch_class_name)
    with exact_roots():
        reference.set_timesteps(10)
    state = scheduler.set_timesteps(scheduler.create_state(), 10, SHAPE)
    x, _ = _pair()
    theirs, ours = torch.from_numpy(x), jnp.asarray(x)
    for i in range(6, 10):
        model_input = reference.scale_model_input(theirs, reference.timesteps[i])
        theirs = reference.step(0.3 * model_input, reference.timesteps[i], theirs).prev_sample
        model_input = scheduler.scale_model_input(state, ours, state.timesteps[i])
        ours, state = scheduler.step(state, 0.3 * model_input, state.timesteps[i], ours)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_dynamic_flow_shift() -> None:
    config: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    shifted = FlaxDPMSolverMultistepScheduler(use_dynamic_shifting=True, **config)
    fixed = FlaxDPMSolverMultistepScheduler(flow_shift=float(np.exp(0.7)), **config)
    a = shifted.set_timesteps(shifted.create_state(), 8, SHAPE, mu=0.7)
    b = fixed.set_timesteps(fixed.create_state(), 8, SHAPE)
    np.testing.assert_allclose(a.sigmas, b.sigmas, rtol=1e-6)


def test_unknown_timestep_is_nan_when_traced() -> None:
    scheduler = FlaxEulerDiscreteScheduler()
    state = scheduler.set_timesteps(scheduler.create_state(), 10)
    x = jnp.ones(SHAPE)
    assert jnp.isnan(jax.jit(scheduler.add_noise)(state, x, x, jnp.array([999.0, 998.5]))[1]).all()
    ddpm = FlaxDDPMScheduler()
    assert jnp.isnan(ddpm.add_noise(ddpm.create_state(), x, x, jnp.array([0, 1000]))[1]).all()


def _ready(scheduler: Any, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any, Any]:
    return scheduler, scheduler.set_timesteps(scheduler.create_state(), 10, shape), jnp.ones(SHAPE)


def _step(scheduler: Any, shape: tuple[int, ...] = SHAPE, timestep: int | None = None, **kwargs: Any) -> Any:
    scheduler, state, x = _ready(scheduler, shape)
    return scheduler.step(state, x, state.timesteps[0] if timestep is None else timestep, x, **kwargs)


def _both() -> dict[str, Any]:
    return {"key": jax.random.key(0), "variance_noise": jnp.ones(SHAPE)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _step(FlaxDDPMScheduler()), "DDPM sampling needs noise: neither"),
        (lambda: _step(FlaxDDPMScheduler(), variance_noise=jnp.ones((3, 4, 4))), "variance_noise has shape"),
        (lambda: _step(FlaxDDPMScheduler(), **_both()), "both of key and variance_noise"),
        (lambda: _step(FlaxDDPMScheduler(variance_type="learned"), **_both()), "model_output has shape"),
        (lambda: _step(FlaxDDIMScheduler(), eta=0.5), "eta=0.5 needs noise"),
        (lambda: _step(FlaxEulerDiscreteScheduler(), s_churn=1.0), "s_churn=1.0 needs noise"),
        (lambda: _step(FlaxDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")), "needs noise"),
        (lambda: _step(FlaxEulerDiscreteScheduler(), timestep=998), "timestep 998 is not in the schedule"),
        (lambda: _step(FlaxDDPMScheduler(), timestep=7, key=jax.random.key(0)), "timestep 7 is not in the schedule"),
        (lambda: _step(FlaxPNDMScheduler(), shape=(1, 3, 4, 4)), "set_timesteps was given"),
        (lambda: _step(FlaxDPMSolverMultistepScheduler(), shape=()), "set_timesteps was given"),
        (lambda: FlaxDDIMScheduler().step(*_unset(FlaxDDIMScheduler())), "call set_timesteps"),
        (lambda: FlaxPNDMScheduler().step(*_unset(FlaxPNDMScheduler())), "call set_timesteps"),
        (lambda: FlaxDDIMScheduler().set_timesteps(FlaxDDIMScheduler().create_state(), 1001), "steps is 1001"),
        (lambda: FlaxPNDMScheduler().set_timesteps(FlaxPNDMScheduler().create_state(), 3), "needs at least 4"),
        (lambda: _dpm_mu(), "it needs use_dynamic_shifting"),
    ],
)
def test_errors(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def _unset(scheduler: Any) -> tuple[Any, ...]:
    return scheduler.create_state(), jnp.ones(SHAPE), 999, jnp.ones(SHAPE)


def _dpm_mu() -> Any:
    scheduler = FlaxDPMSolverMultistepScheduler()
    return scheduler.set_timesteps(scheduler.create_state(), 5, SHAPE, mu=0.5)
