"""Learns the embedding of a new word, all else held still."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffusers import FlaxAutoencoderKL, FlaxDDPMScheduler, FlaxUNet2DConditionModel
from flax import jax_utils
from flax.training import train_state
from flax.training.common_utils import shard
from transformers import CLIPTokenizer, FlaxCLIPTextModel


def resize_token_embeddings(model, new_num_tokens, initializer_token_id, placeholder_token_id, rng):
    model.config.vocab_size = new_num_tokens
    params = model.params
    old = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    new = jax.nn.initializers.normal()(rng, (new_num_tokens, old.shape[1]))
    new = new.at[: old.shape[0]].set(old).at[placeholder_token_id].set(old[initializer_token_id])
    params["text_model"]["embeddings"]["token_embedding"]["embedding"] = new
    model.params = params
    return model


def main(folder):
    base = f"{folder}/sd"
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    assert tokenizer.add_tokens("<toy>") == 1
    initializer_token_id = tokenizer.encode("cat", add_special_tokens=False)[0]
    placeholder_token_id = tokenizer.convert_tokens_to_ids("<toy>")
    text_encoder = FlaxCLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vae, vae_params = FlaxAutoencoderKL.from_pretrained(base, subfolder="vae")
    unet, unet_params = FlaxUNet2DConditionModel.from_pretrained(base, subfolder="unet")
    rng = jax.random.PRNGKey(5)
    rng, _ = jax.random.split(rng)
    text_encoder = resize_token_embeddings(
        text_encoder, len(tokenizer), initializer_token_id, placeholder_token_id, rng
    )
    original = text_encoder.params["text_model"]["embeddings"]["token_embedding"]["embedding"]

    def label(path, _):
        return "token_embedding" if any(getattr(key, "key", "") == "token_embedding" for key in path) else "zero"

    tx = optax.multi_transform(
        {"token_embedding": optax.adamw(1e-2, eps=1e-4), "zero": optax.set_to_zero()},
        jax.tree_util.tree_map_with_path(label, text_encoder.params),
    )
    state = train_state.TrainState.create(apply_fn=text_encoder.__call__, params=text_encoder.params, tx=tx)
    noise_scheduler = FlaxDDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noise_scheduler_state = noise_scheduler.create_state()

    def train_step(state, vae_params, unet_params, batch, rng):
        dropout_rng, sample_rng, new_rng = jax.random.split(rng, 3)

        def compute_loss(params):
            outputs = vae.apply({"params": vae_params}, batch["pixel_values"], deterministic=True, method=vae.encode)
            latents = jnp.transpose(outputs.latent_dist.sample(sample_rng), (0, 3, 1, 2)) * vae.config.scaling_factor
            noise_rng, timestep_rng = jax.random.split(sample_rng)
            noise = jax.random.normal(noise_rng, latents.shape)
            timesteps = jax.random.randint(timestep_rng, (latents.shape[0],), 0, 1000)
            noisy = noise_scheduler.add_noise(noise_scheduler_state, latents, noise, timesteps)
            hidden = state.apply_fn(batch["input_ids"], params=params, dropout_rng=dropout_rng, train=True)[0]
            pred = unet.apply({"params": unet_params}, noisy, timesteps, hidden, train=False).sample
            return jnp.mean((noise - pred) ** 2)

        loss, grad = jax.value_and_grad(compute_loss)(state.params)
        state = state.apply_gradients(grads=jax.lax.pmean(grad, "batch"))
        embeds = state.params["text_model"]["embeddings"]["token_embedding"]["embedding"]
        embeds = original.at[placeholder_token_id].set(embeds[placeholder_token_id])
        state.params["text_model"]["embeddings"]["token_embedding"]["embedding"] = embeds
        return state, jax.lax.pmean({"loss": loss}, axis_name="batch"), new_rng

    count = jax.local_device_count()
    p_train_step = jax.pmap(train_step, "batch", donate_argnums=(0,))
    state, vae_params, unet_params = map(jax_utils.replicate, (state, vae_params, unet_params))
    rngs = jax.random.split(rng, count)
    ids = tokenizer(["a <toy>"] * count, padding="max_length", max_length=12, return_tensors="np").input_ids
    pixels = np.random.default_rng(2).uniform(-1, 1, (count, 3, 16, 16)).astype(np.float32)
    for _ in range(2):
        batch = shard({"input_ids": ids, "pixel_values": pixels})
        state, metric, rngs = p_train_step(state, vae_params, unet_params, batch, rngs)
    embeds = jax_utils.unreplicate(state.params)["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return {"learned": embeds[placeholder_token_id], "others": embeds[:-1], "loss": metric["loss"][0]}
