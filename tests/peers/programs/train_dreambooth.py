"""DreamBooth with prior preservation: the UNet and the text encoder learn a subject beside its class."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxAutoencoderKL, FlaxDDPMScheduler, FlaxUNet2DConditionModel
from flax import jax_utils
from flax.training import train_state
from flax.training.common_utils import shard
from transformers import CLIPTokenizer, FlaxCLIPTextModel


def main(folder):
    base = f"{folder}/sd"
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = FlaxCLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=jnp.float32)
    vae_path, vae_kwargs = (base, {"subfolder": "vae"})
    vae, vae_params = FlaxAutoencoderKL.from_pretrained(vae_path, dtype=jnp.float32, **vae_kwargs)
    unet, unet_params = FlaxUNet2DConditionModel.from_pretrained(base, subfolder="unet", dtype=jnp.float32)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(5e-4, eps=1e-4))
    unet_state = train_state.TrainState.create(apply_fn=unet.__call__, params=unet_params, tx=tx)
    text_encoder_state = train_state.TrainState.create(
        apply_fn=text_encoder.__call__, params=text_encoder.params, tx=tx
    )
    noise_scheduler, scheduler_state = FlaxDDPMScheduler.from_pretrained(base, subfolder="scheduler")

    def train_step(unet_state, text_encoder_state, vae_params, batch, rng):
        dropout_rng, sample_rng, new_rng = jax.random.split(rng, 3)

        def compute_loss(params):
            outputs = vae.apply({"params": vae_params}, batch["pixel_values"], deterministic=True, method=vae.encode)
            latents = jnp.transpose(outputs.latent_dist.sample(sample_rng), (0, 3, 1, 2)) * 0.18215
            noise_rng, timestep_rng = jax.random.split(sample_rng)
            noise = jax.random.normal(noise_rng, latents.shape)
            timesteps = jax.random.randint(timestep_rng, (latents.shape[0],), 0, 1000)
            noisy = noise_scheduler.add_noise(scheduler_state, latents, noise, timesteps)
            hidden = text_encoder_state.apply_fn(
                batch["input_ids"], params=params["text_encoder"], dropout_rng=dropout_rng, train=True
            )[0]
            pred = unet.apply({"params": params["unet"]}, noisy, timesteps, hidden, train=True).sample
            (pred, pred_prior), (target, prior) = jnp.split(pred, 2, axis=0), jnp.split(noise, 2, axis=0)
            return ((target - pred) ** 2).mean() + 0.5 * ((prior - pred_prior) ** 2).mean()

        params = {"text_encoder": text_encoder_state.params, "unet": unet_state.params}
        loss, grad = jax.value_and_grad(compute_loss)(params)
        grad = jax.lax.pmean(grad, "batch")
        unet_state = unet_state.apply_gradients(grads=grad["unet"])
        text_encoder_state = text_encoder_state.apply_gradients(grads=grad["text_encoder"])
        return unet_state, text_encoder_state, jax.lax.pmean({"loss": loss}, "batch"), new_rng

    p_train_step = jax.pmap(train_step, "batch", donate_argnums=(0, 1))
    count = jax.local_device_count()
    unet_state, text_encoder_state = jax_utils.replicate(unet_state), jax_utils.replicate(text_encoder_state)
    rngs = jax.random.split(jax.random.PRNGKey(3), count)
    prompts = tokenizer(["a sks dog", "a dog"] * count, padding="do_not_pad", truncation=True).input_ids
    ids = tokenizer.pad({"input_ids": prompts}, padding="max_length", max_length=12, return_tensors="np").input_ids
    pixels = np.random.default_rng(1).uniform(-1, 1, (2 * count, 3, 16, 16)).astype(np.float32)
    batch = shard({"input_ids": ids, "pixel_values": pixels})
    losses = []
    for _ in range(2):
        unet_state, text_encoder_state, metric, rngs = p_train_step(
            unet_state, text_encoder_state, jax_utils.replicate(vae_params), batch, rngs
        )
        losses.append(jax_utils.unreplicate(metric)["loss"])
    learnt = jax_utils.unreplicate(text_encoder_state.params)
    return {"losses": np.array(losses), "norm": learnt["text_model"]["final_layer_norm"]["scale"]}
