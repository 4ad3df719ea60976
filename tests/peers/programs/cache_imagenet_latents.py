"""Writes the moments of latents of pictures and of their mirror images, channels last, for a class-conditional run."""

import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from diffusers.models import FlaxAutoencoderKL


def main(folder):
    vae, vae_params = FlaxAutoencoderKL.from_pretrained(f"{folder}/sd/vae", dtype=jnp.float32)
    scale = vae.config.scaling_factor

    @partial(jax.jit, static_argnums=2)
    def encode(params, images, flip):
        images = images[:, :, ::-1] if flip else images
        images = jnp.transpose(images.astype(jnp.float32) / 127.5 - 1.0, (0, 3, 1, 2))
        posterior = vae.apply({"params": params}, images, method=FlaxAutoencoderKL.encode).latent_dist
        return jnp.concatenate([posterior.mean, posterior.std], axis=-1)

    @jax.jit
    def sample(moments, key):
        mean, std = jnp.split(moments, 2, axis=-1)
        return (mean + std * jax.random.normal(key, mean.shape)) * scale

    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    moments = [np.asarray(encode(vae_params, images, flip)) for flip in (False, True)]
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, latents=moments[0], latents_flip=moments[1], labels=np.arange(4))
        file.seek(0)
        with np.load(file) as data:
            moments = np.stack([data["latents"], data["latents_flip"]])
    assert moments.shape == (2, 4, 8, 8, 8)
    return {"moments": moments, "latents": sample(moments[0], jax.random.PRNGKey(1))}
