"""Fine-tunes the UNet on captioned pictures, a copy of the state on every device."""

import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import (
    FlaxAutoencoderKL,
    FlaxDDPMScheduler,
    FlaxPNDMScheduler,
    FlaxStableDiffusionPipeline,
    FlaxUNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import FlaxStableDiffusionSafetyChecker
from flax import jax_utils
from flax.training import train_state
from flax.training.common_utils import shard
from transformers import CLIPImageProcessor, CLIPTokenizer, FlaxCLIPTextModel


def main(folder):
    base, dtype = os.path.join(folder, "safe"), jnp.float32
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = FlaxCLIPTextModel.from_pretrained(base, revision=None, subfolder="text_encoder", dtype=dtype)
    vae, vae_params = FlaxAutoencoderKL.from_pretrained(base, revision=None, subfolder="vae", dtype=dtype)
    unet, unet_params = FlaxUNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=dtype)
    adamw = optax.adamw(optax.constant_schedule(1e-3), b1=0.9, b2=0.999, eps=1e-4, weight_decay=1e-2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state = train_state.TrainState.create(apply_fn=unet.__call__, params=unet_params, tx=optimizer)
    noise_scheduler = FlaxDDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    noise_scheduler_state = noise_scheduler.create_state()

    def train_step(state, text_encoder_params, vae_params, batch, train_rng):
        _, sample_rng, new_train_rng = jax.random.split(train_rng, 3)

        def compute_loss(params):
            vae_outputs = vae.apply(
                {"params": vae_params}, batch["pixel_values"], deterministic=True, method=vae.encode
            )
            latents = vae_outputs.latent_dist.sample(sample_rng)
            latents = jnp.transpose(latents, (0, 3, 1, 2)) * vae.config.scaling_factor
            noise_rng, timestep_rng = jax.random.split(sample_rng)
            noise = jax.random.normal(noise_rng, latents.shape)
            steps = noise_scheduler.config.num_train_timesteps
            timesteps = jax.random.randint(timestep_rng, (latents.shape[0],), 0, steps)
            noisy_latents = noise_scheduler.add_noise(noise_scheduler_state, latents, noise, timesteps)
            states = text_encoder(batch["input_ids"], params=text_encoder_params, train=False)[0]
            prediction = unet.apply({"params": params}, noisy_latents, timesteps, states, train=True).sample
            if noise_scheduler.config.prediction_type == "epsilon":
                target = noise
            else:
                target = noise_scheduler.get_velocity(noise_scheduler_state, latents, noise, timesteps)
            return jnp.mean((target - prediction) ** 2)

        loss, grad = jax.value_and_grad(compute_loss)(state.params)
        new_state = state.apply_gradients(grads=jax.lax.pmean(grad, "batch"))
        return new_state, jax.lax.pmean({"loss": loss}, axis_name="batch"), new_train_rng

    p_train_step = jax.pmap(train_step, "batch", donate_argnums=(0,))
    state = jax_utils.replicate(state)
    text_encoder_params = jax_utils.replicate(text_encoder.params)
    vae_params = jax_utils.replicate(vae_params)
    train_rngs = jax.random.split(jax.random.PRNGKey(0), jax.local_device_count())
    losses, count = [], jax.local_device_count()
    pixels = np.random.default_rng(0).uniform(-1, 1, (count, 3, 16, 16)).astype(np.float32)
    ids = tokenizer(["a red cat"] * count, padding="max_length", truncation=True, max_length=12, return_tensors="np")
    for _ in range(2):
        batch = shard({"pixel_values": pixels, "input_ids": ids.input_ids})
        state, train_metric, train_rngs = p_train_step(state, text_encoder_params, vae_params, batch, train_rngs)
        losses.append(jax_utils.unreplicate(train_metric)["loss"])

    pipeline = FlaxStableDiffusionPipeline(
        text_encoder=text_encoder,
        vae=vae,
        unet=unet,
        tokenizer=tokenizer,
        scheduler=FlaxPNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
        ),
        safety_checker=FlaxStableDiffusionSafetyChecker.from_pretrained(folder + "/torch/safety_checker", from_pt=True),
        feature_extractor=CLIPImageProcessor.from_pretrained(base + "/feature_extractor"),
    )
    get_params = jax_utils.unreplicate
    with tempfile.TemporaryDirectory() as output_dir:
        pipeline.save_pretrained(
            output_dir,
            params={
                "text_encoder": get_params(text_encoder_params),
                "vae": get_params(vae_params),
                "unet": get_params(state.params),
                "safety_checker": pipeline.safety_checker.params,
            },
        )
        _, params = FlaxStableDiffusionPipeline.from_pretrained(output_dir)
    return {"losses": np.array(losses), "conv_in": params["unet"]["conv_in"]["kernel"]}
