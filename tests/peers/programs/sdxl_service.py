"""SDXL with a negative prompt on every device, then latents and a refining call of one prompt."""

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxStableDiffusionXLPipeline
from flax.jax_utils import replicate

NUM_DEVICES = jax.device_count()


def tokenize_prompt(pipeline, prompt, neg_prompt):
    return pipeline.prepare_inputs(prompt), pipeline.prepare_inputs(neg_prompt)


def replicate_all(prompt_ids, neg_prompt_ids, seed):
    rng = jax.random.split(jax.random.PRNGKey(seed), NUM_DEVICES)
    return replicate(prompt_ids), replicate(neg_prompt_ids), rng


def main(folder):
    pipeline, params = FlaxStableDiffusionXLPipeline.from_pretrained(f"{folder}/sdxl", split_head_dim=True)
    scheduler_state = params.pop("scheduler")
    params = jax.tree_util.tree_map(lambda x: x.astype(jnp.float32), params)
    params["scheduler"] = scheduler_state
    p_params = replicate(params)
    prompt_ids, neg_prompt_ids = tokenize_prompt(pipeline, "a red cat", "dog")
    p_prompt_ids, p_neg_prompt_ids, rng = replicate_all(prompt_ids, neg_prompt_ids, 33)
    images = pipeline(
        p_prompt_ids,
        p_params,
        rng,
        num_inference_steps=3,
        neg_prompt_ids=p_neg_prompt_ids,
        guidance_scale=5.0,
        jit=True,
    ).images
    images = images.reshape((images.shape[0] * images.shape[1],) + images.shape[-3:])
    pipeline.numpy_to_pil(np.array(images))
    key = jax.random.PRNGKey(7)
    latents = pipeline(prompt_ids, params, key, num_inference_steps=3, output_type="latent").images
    embeds, pooled = pipeline.get_embeddings(prompt_ids, params)
    return {"images": images, "latents": latents, "embeds": embeds, "pooled": pooled}
