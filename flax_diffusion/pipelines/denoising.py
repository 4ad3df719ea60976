"""What the pipelines of Stable Diffusion have in common: the loop over timesteps, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.pipelines.running import draw_normal
from flax_diffusion.schedulers import FlaxDDPMScheduler

Predict = Callable[[Array, Array], Array]
"""A denoiser: from scaled samples (2·N, C, h, w) and timesteps (2·N,) to predictions; the second half is prompted."""


def denoise(
    scheduler: Any,
    state: Any,
    predict: Predict,
    latents: Array,
    guidance_scale: Array,
    keys: Array,
    *,
    steps: int,
    start: int = 0,
) -> Array:
    """Denoise latents under classifier-free guidance.

    Args:
        scheduler: The scheduler.
        state: Its state, after `set_timesteps`.
        predict: The denoiser.
        latents: Noisy samples, (N, C, h, w).
        guidance_scale: Scale w of each picture, (N,).
        keys: Random keys, (groups, …), for schedulers that add noise in a step.
        steps: The first timestep that is left out. As in Diffusers' Flax it is the number of inference steps, which is
            one less than the number of timesteps that PNDM sets.
        start: The first timestep that is used.

    Returns:
        The denoised samples, float32 (N, C, h, w).

    Reference:
        Ho and Salimans, https://arxiv.org/abs/2207.12598, with Diffusers' w: ε_∅ + w·(ε_c − ε_∅).
    """
    scale = guidance_scale.reshape(-1, 1, 1, 1)
    stochastic = isinstance(scheduler, FlaxDDPMScheduler) or str(scheduler.config.get("algorithm_type")).startswith(
        "sde"
    )

    def step(carry: tuple[Array, Any], place: Array) -> tuple[tuple[Array, Any], None]:
        latents, state = carry
        timestep = state.timesteps[place]
        doubled = scheduler.scale_model_input(state, jnp.concatenate([latents, latents]), timestep)
        predicted = predict(doubled, jnp.broadcast_to(timestep, doubled.shape[:1])).astype(jnp.float32)
        without, with_prompt = jnp.split(predicted, 2)
        predicted = without + scale * (with_prompt - without)
        noise = {}
        if stochastic:
            folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
            noise["variance_noise"] = draw_normal(folded, latents.shape)
        output = scheduler.step(state, predicted, timestep, latents, **noise)
        return (output.prev_sample, output.state), None

    (latents, _), _ = jax.lax.scan(step, (latents.astype(jnp.float32), state), jnp.arange(start, steps))
    return latents


def decode(parts: Mapping[str, Any], params: Any, latents: Array) -> Array:
    """Decode scaled latents (N, C, h, w) to pictures in [0, 1], float32 (N, H, W, 3).

    Args:
        parts: With the autoencoder as "vae".
        params: Parameters by part.
        latents: The latents.
    """
    vae = parts["vae"]
    latents = jnp.transpose(latents / vae.scaling_factor, (0, 2, 3, 1))
    images = vae.apply({"params": params["vae"]}, latents, method=vae.decode).sample
    return jnp.clip(images.astype(jnp.float32) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)


def encode(parts: Mapping[str, Any], params: Any, images: Array, keys: Array) -> Array:
    """Sample scaled latents (N, C, h, w) of pictures.

    Args:
        parts: With the autoencoder as "vae".
        params: Parameters by part.
        images: Pictures in [-1, 1], (N, 3, H, W).
        keys: Random keys, (groups, …).
    """
    vae = parts["vae"]
    posterior = vae.apply({"params": params["vae"]}, images, method=vae.encode).latent_dist
    latents = posterior.sample_with(draw_normal(keys, posterior.mean.shape))
    return vae.scaling_factor * latents.transpose(0, 3, 1, 2)


def start_latents(given: Array | None, keys: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Return the noise that denoising starts from.

    Args:
        given: Noise of the user's; None draws it.
        keys: Random keys, (groups, …).
        shape: Shape of the latents, (N, C, h, w).
        dtype: Dtype to draw in.

    Raises:
        ConfigError: If given noise has another shape.
    """
    if given is None:
        return draw_normal(keys, shape, dtype)
    if given.shape != shape:
        raise ConfigError(f"latents have shape {given.shape}, and these pictures need {shape}: draw them in that shape")
    return given
