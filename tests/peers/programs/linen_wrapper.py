"""A Linen module around the pretrained models, whose parameters are its own and train with optax."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn


class LatentDiffusion(nn.Module):
    model_path: str

    def setup(self):
        self.vae, vae_params = diffusers.FlaxAutoencoderKL.from_pretrained(self.model_path, subfolder="vae")
        self.unet, unet_params = diffusers.FlaxUNet2DConditionModel.from_pretrained(self.model_path, subfolder="unet")
        self.vae_params = self.param("vae_params", lambda _: vae_params)
        self.unet_params = self.param("unet_params", lambda _: unet_params)
        self.noise_scheduler = diffusers.FlaxDDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
        )
        self.noise_scheduler_state = self.noise_scheduler.create_state()

    def __call__(self, images, context):
        pixels = jnp.transpose(images, (0, 3, 1, 2))
        key = self.make_rng("noise")
        posterior = self.vae.apply({"params": self.vae_params}, pixels, deterministic=True, method=self.vae.encode)
        latents = jnp.transpose(posterior.latent_dist.sample(key), (0, 3, 1, 2)) * self.vae.config.scaling_factor
        noise = jax.random.normal(key, latents.shape)
        timesteps = jax.random.randint(key, (len(latents),), 0, self.noise_scheduler.config.num_train_timesteps)
        noisy = self.noise_scheduler.add_noise(self.noise_scheduler_state, latents, noise, timesteps)
        prediction = self.unet.apply({"params": self.unet_params}, noisy, timesteps, context, train=True).sample
        return jnp.mean((prediction - noise) ** 2)


def main(folder):
    model, key = LatentDiffusion(model_path=f"{folder}/sd"), jax.random.PRNGKey(0)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    context = jax.random.normal(key, (2, 12, 32))
    variables = model.init({"params": key, "noise": key}, images, context)
    tx = optax.sgd(1e-3)
    opt_state = tx.init(variables["params"])

    @jax.jit
    def step(params, opt_state):
        loss, grads = jax.value_and_grad(
            lambda params: model.apply({"params": params}, images, context, rngs={"noise": key})
        )(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    params, opt_state, loss = step(variables["params"], opt_state)
    return {"loss": loss, "bias": params["unet_params"]["conv_out"]["bias"]}
