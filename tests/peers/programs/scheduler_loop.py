"""Research on samplers without a network: a known score, stepped through inside one compiled loop."""

from functools import partial

import jax
import jax.numpy as jnp
from diffusers import FlaxDDIMScheduler, FlaxDDPMScheduler, FlaxPNDMScheduler
from diffusers.schedulers.scheduling_utils_flax import FlaxKarrasDiffusionSchedulers, FlaxSchedulerMixin

SHAPE, STEPS = (2, 3, 4, 4), 10  # DDPM takes every step that it was trained for


def predict(alphas_cumprod, sample, t):
    """The noise in samples of standard normal pictures around one half."""
    alpha = alphas_cumprod[t]
    return (sample - jnp.sqrt(alpha) * 0.5) * jnp.sqrt(1 - alpha)


@partial(jax.jit, static_argnums=(0, 3))
def draw(scheduler, state, key, steps):
    state = scheduler.set_timesteps(state, num_inference_steps=steps, shape=SHAPE)
    alphas_cumprod = state.common.alphas_cumprod

    def body(step, args):
        sample, state = args
        t = jnp.array(state.timesteps, dtype=jnp.int32)[step]
        sample = scheduler.scale_model_input(state, sample, t)
        noise = predict(alphas_cumprod, sample, t)
        keys = {"key": jax.random.fold_in(key, step)} if isinstance(scheduler, FlaxDDPMScheduler) else {}
        return scheduler.step(state, noise, t, sample, **keys).to_tuple()

    sample = jax.random.normal(key, SHAPE) * state.init_noise_sigma
    return jax.lax.fori_loop(0, steps, body, (sample, state))[0]


def main(folder):
    key, found = jax.random.PRNGKey(0), {}
    assert issubclass(FlaxDDIMScheduler, FlaxSchedulerMixin)
    assert "FlaxPNDMScheduler" in [kind.name for kind in FlaxKarrasDiffusionSchedulers]
    schedulers = {
        "ddim": FlaxDDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1),
        "ddpm": FlaxDDPMScheduler(STEPS, beta_schedule="squaredcos_cap_v2", variance_type="fixed_large"),
        "pndm": FlaxPNDMScheduler.from_config({"skip_prk_steps": True, "num_train_timesteps": 500}),
    }
    for name, scheduler in schedulers.items():
        if isinstance(scheduler, tuple):
            scheduler, _ = scheduler
        state = scheduler.create_state()
        found[name] = draw(scheduler, state, key, STEPS)
        clean = jnp.ones(SHAPE)
        noisy = scheduler.add_noise(state, clean, jax.random.normal(key, SHAPE), jnp.array([3, 9]))
        found[f"{name} noisy"] = noisy
        found[f"{name} betas"] = state.common.betas
    return found
