"""The bound that trains a learned variance, against normal distributions of PyTorch, on both backends."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import torch_backend.losses as theirs
from flax_diffusion.core.objectives import noise_schedule
from flax_diffusion.core.objectives.ddpm import Ddpm, DdpmOptions
from flax_diffusion.core.objectives.variational_bound import variance_terms
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training
from flax_diffusion.core.tasks.common.variance import with_variance
from flax_diffusion.jax_backend import losses as ours

STEPS = 1000
TRANSFORMER = Component(
    kind="DiTTransformer2DModel", config={"in_channels": 2, "out_channels": 4}, training=Training.ALL
)
SCHEDULES = {
    "epsilon": {},
    "v_prediction": {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
    "sample": {"beta_schedule": "scaled_linear"},
}


def example(predicted: str, timesteps: list[int]) -> Any:
    """What a model gives for some examples, and what the bound is told of them; with the whole schedule, ᾱ (T,)."""
    scheduler = {"_class_name": "DDPMScheduler", "prediction_type": predicted} | SCHEDULES[predicted]
    spec = PipelineSpec(kind="DiTPipeline", components={"transformer": TRANSFORMER}, scheduler=scheduler, resolution=8)
    objective: Any = with_variance(Ddpm.from_scheduler(scheduler, DdpmOptions(), np.float64), spec, 0.001, np.float64)
    mixtures = [objective.at(timestep) for timestep in timesteps]
    rng = np.random.default_rng(0)
    clean, noise, error = rng.uniform(-1.1, 1.1, (3, len(timesteps), 2, 3, 3))
    variance = rng.uniform(-1.2, 1.2, clean.shape)
    batch = {"timesteps": np.array(timesteps)}
    batch |= {name: table[timesteps] for name, table in objective.variance._asdict().items()}
    return mixtures, batch, clean, noise, error / 5, variance, noise_schedule.alphas_cumprod_from_config(scheduler)


@pytest.mark.parametrize("predicted", SCHEDULES)
def test_bound(predicted):
    """In bits per number, as the sum over all timesteps, times λ; at t = 0 of values in 256 bins."""
    timesteps = [0, 1, 2, 17, 500, 998, 999]
    mixtures, batch, clean, noise, error, variance, bar = example(predicted, timesteps)
    with jax.enable_x64(True):
        here = np.asarray(jax.jit(ours.variational_bound)(batch, clean, error, variance))
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    there = theirs.variational_bound(tensors, *map(torch.from_numpy, (clean, error, variance))).numpy()
    np.testing.assert_allclose(there, here, rtol=1e-12)

    before = np.append(1.0, bar[:-1])
    for place, (timestep, mixture) in enumerate(zip(timesteps, mixtures, strict=True)):
        x, alpha, beta = clean[place], bar[timestep] / before[timestep], 1 - bar[timestep] / before[timestep]
        given = mixture.input_clean * x + mixture.input_noise * noise[place]
        target = mixture.target_clean * x + mixture.target_noise * noise[place]
        guess = mixture.clean(given, target + error[place])
        left = 1 - bar[timestep]

        def mean_of(x0, given=given, t=timestep, alpha=alpha, beta=beta, left=left):
            return np.sqrt(before[t]) * beta / left * x0 + np.sqrt(alpha) * (1 - before[t]) / left * given

        small = [beta * (1 - before[timestep]) / left, (1 - bar[1] / bar[0]) * (1 - bar[0]) / (1 - bar[1])][
            timestep == 0
        ]
        share = (variance[place] + 1) / 2
        deviation = np.exp((share * np.log(beta) + (1 - share) * np.log(small)) / 2)
        step = Normal(torch.from_numpy(mean_of(guess)), torch.from_numpy(deviation))
        if timestep == 0:
            value = torch.from_numpy(x)
            below, to = step.cdf(value - 1 / 255), step.cdf(value + 1 / 255)
            chance = torch.where(value < -0.999, to, torch.where(value > 0.999, 1 - below, to - below))
            nats = -torch.log(chance.clamp(min=1e-12)).mean()
        else:
            true = Normal(torch.from_numpy(mean_of(x)), torch.full(x.shape, float(np.sqrt(small))).double())
            nats = kl_divergence(true, step).mean()
        expected = 0.001 * STEPS * float(nats) / np.log(2)
        # The bins of t = 0 take the papers' approximation of the normal distribution.
        np.testing.assert_allclose(here[place], expected, rtol=0.02 if timestep == 0 else 1e-6, atol=1e-12)


def test_gradients_move_the_variance_alone():
    _, batch, clean, _, error, variance, _ = example("epsilon", [0, 3, 900])
    with jax.enable_x64(True):
        of_error, of_variance = jax.jit(
            jax.grad(lambda *given: ours.variational_bound(batch, clean, *given).sum(), argnums=(0, 1))
        )(error, variance)
    assert not np.any(of_error)
    assert np.all(of_variance[1:])
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    given: list[Any] = [torch.from_numpy(array).requires_grad_() for array in (error, variance)]
    theirs.variational_bound(tensors, torch.from_numpy(clean), *given).sum().backward()
    assert given[0].grad is None
    np.testing.assert_allclose(given[1].grad.numpy(), of_variance, rtol=1e-10, atol=1e-14)


def test_an_example_has_the_terms_of_its_timestep():
    scheduler = {"_class_name": "DDPMScheduler"}
    spec = PipelineSpec(kind="DiTPipeline", components={"transformer": TRANSFORMER}, scheduler=scheduler, resolution=8)
    plain: Any = Ddpm.from_scheduler(scheduler, DdpmOptions())
    objective: Any = with_variance(plain, spec, 0.001, np.float32)
    drawn, without = objective.draw(np.random.default_rng(3)), plain.draw(np.random.default_rng(3))
    assert drawn[: len(without)] == without
    assert drawn._fields == (*without._fields, *objective.variance._fields)
    for name, table in objective.variance._asdict().items():
        assert getattr(drawn, name) == table[int(drawn.timesteps)]


def test_a_schedule_of_one_step():
    terms = variance_terms(np.array([0.9]), np.zeros(1), np.ones(1), 1.0, np.float32)
    assert np.all(np.isfinite(terms))
