"""Trains a ControlNet that starts from the UNet's encoder, with the loss weighted by the signal-to-noise ratio."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxAutoencoderKL, FlaxControlNetModel, FlaxDDPMScheduler, FlaxUNet2DConditionModel
from flax import jax_utils
from flax.core.frozen_dict import unfreeze
from flax.training import train_state
from flax.training.common_utils import shard
from transformers import CLIPTokenizer, FlaxCLIPTextModel


def main(folder):
    base, rng = f"{folder}/control", jax.random.PRNGKey(0)
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = FlaxCLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vae, vae_params = FlaxAutoencoderKL.from_pretrained(base, subfolder="vae", from_pt=True)
    unet, unet_params = FlaxUNet2DConditionModel.from_pretrained(base, subfolder="unet", from_pt=True)
    rng, rng_params = jax.random.split(rng)
    controlnet = FlaxControlNetModel(
        in_channels=unet.config.in_channels,
        down_block_types=unet.config.down_block_types,
        only_cross_attention=unet.config.only_cross_attention,
        block_out_channels=unet.config.block_out_channels,
        layers_per_block=unet.config.layers_per_block,
        attention_head_dim=unet.config.attention_head_dim,
        cross_attention_dim=unet.config.cross_attention_dim,
        use_linear_projection=unet.config.use_linear_projection,
        flip_sin_to_cos=unet.config.flip_sin_to_cos,
        freq_shift=unet.config.freq_shift,
        conditioning_embedding_out_channels=(16, 16, 16, 32),
    )
    controlnet_params = unfreeze(controlnet.init_weights(rng=rng_params))
    for key in ["conv_in", "time_embedding", "down_blocks_0", "down_blocks_1", "mid_block"]:
        controlnet_params[key] = unet_params[key]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2))
    state = train_state.TrainState.create(apply_fn=controlnet.__call__, params=controlnet_params, tx=tx)
    noise_scheduler, noise_scheduler_state = FlaxDDPMScheduler.from_pretrained(base, subfolder="scheduler")

    def compute_snr(timesteps):
        alphas_cumprod = noise_scheduler_state.common.alphas_cumprod
        return (alphas_cumprod**0.5 / (1.0 - alphas_cumprod) ** 0.5)[timesteps] ** 2

    def train_step(state, unet_params, text_encoder_params, vae_params, batch, train_rng):
        def compute_loss(params, sample_rng):
            outputs = vae.apply({"params": vae_params}, batch["pixel_values"], deterministic=True, method=vae.encode)
            latents = jnp.transpose(outputs.latent_dist.sample(sample_rng), (0, 3, 1, 2)) * vae.config.scaling_factor
            noise_rng, timestep_rng = jax.random.split(sample_rng)
            noise = jax.random.normal(noise_rng, latents.shape)
            timesteps = jax.random.randint(timestep_rng, (latents.shape[0],), 0, 1000)
            noisy = noise_scheduler.add_noise(noise_scheduler_state, latents, noise, timesteps)
            hidden = text_encoder(batch["input_ids"], params=text_encoder_params, train=False)[0]
            down_block_res_samples, mid_block_res_sample = controlnet.apply(
                {"params": params}, noisy, timesteps, hidden, batch["cond"], train=True, return_dict=False
            )
            pred = unet.apply(
                {"params": unet_params},
                noisy,
                timesteps,
                hidden,
                down_block_additional_residuals=down_block_res_samples,
                mid_block_additional_residual=mid_block_res_sample,
            ).sample
            snr = compute_snr(timesteps)
            weights = jnp.where(snr < 5.0, snr, jnp.ones_like(snr) * 5.0) / snr
            return (((noise - pred) ** 2).mean(axis=(1, 2, 3)) * weights).mean()

        train_rng, sample_rng = jax.random.split(train_rng, 2)
        loss, grad = jax.value_and_grad(compute_loss)(state.params, sample_rng)
        state = state.apply_gradients(grads=jax.lax.pmean(grad, "batch"))
        return state, jax.lax.pmean({"loss": loss}, axis_name="batch"), train_rng

    p_train_step = jax.pmap(train_step, "batch", donate_argnums=(0,))
    count = jax.local_device_count()
    ids = tokenizer(["a red dog"] * count, padding="max_length", max_length=12, return_tensors="np").input_ids
    draw = np.random.default_rng(4)
    pixels, cond = (draw.uniform(low, 1, (count, 3, 64, 64)).astype(np.float32) for low in (-1, 0))
    batch = shard({"pixel_values": pixels, "cond": cond, "input_ids": ids})
    state, unet_params, vae_params = map(jax_utils.replicate, (state, unet_params, vae_params))
    text_encoder_params = jax_utils.replicate(text_encoder.params)
    rngs, losses = jax.random.split(rng, count), []
    for _ in range(2):
        state, metric, rngs = p_train_step(state, unet_params, text_encoder_params, vae_params, batch, rngs)
        losses.append(jax_utils.unreplicate(metric)["loss"])
    with tempfile.TemporaryDirectory() as output_dir:
        controlnet.save_pretrained(output_dir, params=jax.device_get(jax_utils.unreplicate(state.params)))
        _, params = FlaxControlNetModel.from_pretrained(output_dir)
    zero = params["controlnet_mid_block"]
    return {"losses": np.array(losses), "kernel": zero["kernel"], "bias": zero["bias"]}
