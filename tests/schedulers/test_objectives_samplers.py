"""Heun, DPM-Solver++ and the SDE of flow matching and EDM: against PyTorch's classes, and against exact solutions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_reference import SHAPE, drawn, exact_roots, flax_trajectory, make, relative, torch_trajectory, toy_model

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives import samplers
from flax_diffusion.schedulers import (
    FlaxEDMDPMSolverMultistepScheduler,
    FlaxEDMEulerScheduler,
    FlaxEDMHeunScheduler,
    FlaxFlowMatchEulerDiscreteScheduler,
    FlaxFlowMatchHeunDiscreteScheduler,
    FlaxFlowMatchSDEScheduler,
    scheduler_from_config,
)
from torch_backend.sampling import HostNoise
from torch_backend.sampling import scheduler_from_config as torch_scheduler
from torch_backend.schedulers import EDMHeunScheduler, FlowMatchSDEScheduler

HEUN, DPM = "FlowMatchHeunDiscreteScheduler", "EDMDPMSolverMultistepScheduler"
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
CASES = [
    (HEUN, {}, {}),
    (HEUN, {"shift": 3.0}, {}),
    (HEUN, {"shift": 0.5, "num_train_timesteps": 50}, {}),
    (HEUN, {"shift": 3.0}, {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 0.9, "s_noise": 1.003}),
    *[(DPM, {"solver_order": order, "solver_type": form}, {}) for order, form in ((1, "midpoint"), (2, "heun"))],
    (DPM, {}, {}),
    (DPM, {"solver_order": 3, "final_sigmas_type": "sigma_min", "rho": 3.0, "sigma_min": 0.02}, {}),
    (DPM, {"solver_order": 3, "euler_at_final": True, "lower_order_final": False}, {}),
    (DPM, {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 10.0}, {}),
    (DPM, {"thresholding": True, "sample_max_value": 1.5}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver++"}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
]


def ours_of(name, **config):
    known = {HEUN: FlaxFlowMatchHeunDiscreteScheduler, DPM: FlaxEDMDPMSolverMultistepScheduler}
    return known[name](**config)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("steps", [7, 16])
@pytest.mark.parametrize(("name", "config", "step"), CASES)
def test_trajectory(name, config, step, steps, scan):
    """In both precisions within PyTorch's in float64; its float32 of Heun's x − (x − σ·v), over σ, is 3e-6 away."""
    theirs = torch_trajectory(make(name, **config), steps, True, **step)
    assert relative(flax_trajectory(ours_of(name, **config), steps, scan=scan, **step), theirs) < 1e-6
    with jax.enable_x64(True):
        wide = ours_of(name, **config, dtype=jnp.float64)
        assert relative(flax_trajectory(wide, steps, scan=scan, **step), theirs) < 1e-12


@pytest.mark.parametrize("steps", [1, 6, 20])
@pytest.mark.parametrize(("name", "config", "step"), CASES)
def test_schedule(name, config, step, steps):
    """To the bit."""
    theirs, ours = make(name, **config), ours_of(name, **config)
    np.testing.assert_array_equal(ours.create_state().timesteps, theirs.timesteps.numpy())
    with exact_roots():
        theirs.set_timesteps(steps)
    state = ours.set_timesteps(ours.create_state(), steps)
    np.testing.assert_array_equal(state.sigmas, theirs.sigmas.numpy())
    np.testing.assert_array_equal(state.timesteps, theirs.timesteps.numpy())


@pytest.mark.parametrize(
    ("ours", "theirs", "config"),
    [
        (FlaxEDMHeunScheduler, EDMHeunScheduler, {}),
        (FlaxEDMHeunScheduler, EDMHeunScheduler, {"final_sigmas_type": "sigma_min", "rho": 3.0}),
        (FlaxFlowMatchSDEScheduler, FlowMatchSDEScheduler, {}),
        (
            FlaxFlowMatchSDEScheduler,
            FlowMatchSDEScheduler,
            {"shift": 3.0, "diffusion_norm": 2.0, "last_step_size": 0.1},
        ),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_own_samplers_are_the_same_on_both_backends(ours, theirs, config, steps):
    with exact_roots():
        twin = theirs(**config)
        twin.set_timesteps(steps)
    twin.sigmas, path = twin.sigmas.double(), []
    first, noise = drawn(len(twin.timesteps), np.float64)
    sample = torch.from_numpy(first) * getattr(twin, "init_noise_sigma", 1)
    for t in twin.timesteps:
        given = twin.scale_model_input(sample, t) if hasattr(twin, "scale_model_input") else sample
        with HostNoise(lambda: torch.from_numpy(noise[len(path)])):
            sample = twin.step(toy_model(given, t.double(), False), t, sample).prev_sample
        path.append(sample.numpy())
    with jax.enable_x64(True):
        found = flax_trajectory(ours(**config, dtype=jnp.float64), steps, scan=True)
    assert len(found) == len(path) == (2 * steps - 1 if ours is FlaxEDMHeunScheduler else steps)
    assert relative(found, np.stack(path)) < 1e-12


MEAN, DEVIATION = 0.7, 0.4
"""Of a Gaussian data distribution, where a perfect model is known in closed form."""


def velocity(x, t):
    """E[ε − x0 | x] of flow matching."""
    far = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * DEVIATION**2 + t**2)
    return t * far - (MEAN + (1 - t) * DEVIATION**2 * far)


def network(x, told, data=0.5):
    """F of EDM for the scaled sample c_in·x."""
    sigma = jnp.exp(4 * told)
    total = jnp.sqrt(sigma**2 + data**2)
    x = x * total
    clean = (DEVIATION**2 * x + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)
    return (clean - (data / total) ** 2 * x) / (sigma * data / total)


def end(scheduler, model, first, steps, noise=None):
    """The last sample of a trajectory, compiled as a scan."""
    state = scheduler.set_timesteps(scheduler.create_state(), steps, first.shape)

    def body(carry, inputs):
        (sample, state), (t, noise) = carry, inputs
        output = model(scheduler.scale_model_input(state, sample, t), t)
        after = scheduler.step(state, output, t, sample, variance_noise=noise)
        return tuple(after), None

    return jax.lax.scan(body, (first * state.init_noise_sigma, state), (state.timesteps, noise))[0][0]


@pytest.mark.parametrize(
    ("cls", "ratio"),
    [
        (FlaxFlowMatchEulerDiscreteScheduler, 2),
        (FlaxFlowMatchHeunDiscreteScheduler, 4),
        (FlaxEDMEulerScheduler, 2),
        (FlaxEDMHeunScheduler, 4),
        (FlaxEDMDPMSolverMultistepScheduler, 4),
    ],
)
def test_order_of_convergence(cls, ratio):
    """Halving the steps divides the error by 2 in a method of first order, by 4 in one of second."""
    with jax.enable_x64(True):
        first = jnp.asarray([-1.2, 0.3, 1.7])
        if issubclass(cls, FlaxEDMEulerScheduler):
            scheduler, model = cls(sigma_min=1e-4, sigma_max=10.0, dtype=jnp.float64), network
            exact = MEAN + (first * np.sqrt(101.0) - MEAN) * DEVIATION / np.sqrt(DEVIATION**2 + 100)
        else:
            total = 2**20
            scheduler = cls(num_train_timesteps=total, dtype=jnp.float64)
            model, exact = lambda x, told: velocity(x, told / total), MEAN + DEVIATION * first
        errors = [float(np.abs(end(scheduler, model, first, steps) - exact).max()) for steps in (65, 129, 257)]
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.1)


def test_dpm_solver_of_flow_matching():
    """Nearer than Euler's method, though its timesteps, which tell the model the time, are whole numbers."""
    ours = scheduler_from_config(FLOW, "dpm++")
    assert (ours.flow_shift, ours.prediction_type, ours.use_flow_sigmas) == (3.0, "flow_prediction", True)
    first = jnp.asarray([-1.2, 0.3, 1.7])

    def error(scheduler):
        drawn = end(scheduler, lambda x, told: velocity(x, told / 1000), first, 30)
        return float(np.abs(drawn - (MEAN + DEVIATION * first)).max())

    assert error(ours) < 0.25 * error(scheduler_from_config(FLOW))


@pytest.mark.parametrize("form", ["sigma", "constant"])
def test_the_sde_keeps_mean_and_variance(form):
    """The samples have those of the data, whatever noise is added; without noise the method is Euler's."""
    steps, count = 200, 20_000
    scheduler = FlaxFlowMatchSDEScheduler(diffusion_form=form, last_step_size=1 / steps)
    model = lambda x, told: velocity(x, told / 1000)  # noqa: E731
    noise = np.random.default_rng(0).standard_normal((steps + 1, count)).astype(np.float32)
    drawn = np.asarray(end(scheduler, model, jnp.asarray(noise[0]), steps, jnp.asarray(noise[1:])))
    assert drawn.mean() == pytest.approx(MEAN, abs=4 * DEVIATION / np.sqrt(count) + 0.005)
    assert drawn.std() == pytest.approx(DEVIATION, rel=4 / np.sqrt(2 * count) + 0.01)
    plain = end(
        FlaxFlowMatchSDEScheduler(diffusion_norm=0.0), model, jnp.asarray(noise[0]), steps, jnp.asarray(noise[1:])
    )
    assert abs(np.corrcoef(drawn, noise[0])[0, 1]) < 0.6 < 0.999 < np.corrcoef(plain, noise[0])[0, 1]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("kind", samplers.SAMPLERS)
@pytest.mark.parametrize("trained", ["DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_both_backends_have_the_same_samplers(kind, trained):
    known = {"DDPMScheduler": samplers.OF_BETAS, **samplers._BY_TRAINED}[trained]
    config = {"_class_name": trained}
    if kind in known:
        ours, theirs = scheduler_from_config(config, kind), torch_scheduler(config, kind)
        assert type(theirs).__name__ == ours.torch_class_name == known[kind]
        return
    for make_of in (scheduler_from_config, torch_scheduler):
        with pytest.raises(ConfigError, match=f"'{kind.replace('+', '.')}': does not draw from this model; use one of"):
            make_of(config, kind)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: FlaxFlowMatchHeunDiscreteScheduler(shift=0.0), r"shift is 0\.0; it must be greater than 0"),
        (lambda: FlaxFlowMatchSDEScheduler(shift=-1.0), r"shift is -1\.0; it must be greater than 0"),
        (lambda: FlaxFlowMatchSDEScheduler(diffusion_norm=-1.0), "diffusion_norm is -1.0; it must be at least 0"),
        (lambda: FlaxFlowMatchSDEScheduler(last_step_size=1.0), "last_step_size is 1.0; it must lie between 0 and 1"),
        (lambda: FlaxFlowMatchSDEScheduler(diffusion_form="SBDM"), "diffusion_form is 'SBDM'"),  # pyright: ignore
        (
            lambda: FlaxEDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3),
            "solver_order is 3; with algorithm_type 'sde-dpmsolver.*between 1 and 2",
        ),
        (
            lambda: scheduler_from_config(FLOW | {"use_beta_sigmas": True}, "heun"),
            "'heun' has no use_beta_sigmas, which",
        ),
        (
            lambda: torch_scheduler(FLOW | {"shift_terminal": 0.1}, "sde"),
            "'sde' has no shift_terminal, which the model",
        ),
    ],
)
def test_mistakes(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


@pytest.mark.parametrize(
    "cls",
    [
        FlaxFlowMatchHeunDiscreteScheduler,
        FlaxEDMHeunScheduler,
        FlaxFlowMatchSDEScheduler,
        functools.partial(FlaxEDMDPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    ],
)
def test_calls(cls, tmp_path):
    """Timesteps must be set, for the sample's shape; noise is added; a config is written and read."""
    ours, x = cls(), jnp.ones(SHAPE)
    with pytest.raises(ConfigError, match="no timesteps are set"):
        ours.step(ours.create_state(), x, 1.0, x, variance_noise=x)
    with pytest.raises(ConfigError, match=r"num_inference_steps is 0; it must be at least 1|at least 1: they say 0"):
        ours.set_timesteps(ours.create_state(), 0)
    state = ours.set_timesteps(ours.create_state(), 4, SHAPE)
    if not isinstance(ours, FlaxFlowMatchSDEScheduler):
        with pytest.raises(ConfigError, match="but set_timesteps was given"):
            ours.step(state, x[:1], state.timesteps[0], x[:1])
    sigma = float(state.sigmas[-2])
    clean = 1 - sigma if ours.torch_class_name.startswith("Flow") else 1
    np.testing.assert_allclose(ours.add_noise(state, x, 2 * x, state.timesteps[-1]), (clean + 2 * sigma) * x, rtol=1e-6)
    ours.save_pretrained(tmp_path)
    assert type(ours).from_pretrained(tmp_path)[0] == ours
    assert scheduler_from_config(tmp_path) == ours
