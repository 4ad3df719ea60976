"""A sketch turned into pictures, one a device."""

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxStableDiffusionImg2ImgPipeline
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from PIL import Image


def create_key(seed=0):
    return jax.random.PRNGKey(seed)


def main(folder):
    init_img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    init_img = init_img.resize((32, 32))
    pipeline, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(
        f"{folder}/sd", dtype=jnp.float32, safety_checker=None, feature_extractor=None
    )
    num_samples = jax.device_count()
    rng = jax.random.split(create_key(0), num_samples)
    prompt_ids, processed_image = pipeline.prepare_inputs(
        prompt=["a red cat"] * num_samples, image=[init_img] * num_samples
    )
    p_params = replicate(params)
    output = pipeline(
        prompt_ids=shard(prompt_ids),
        image=shard(processed_image),
        params=p_params,
        prng_seed=rng,
        strength=0.75,
        num_inference_steps=6,
        jit=True,
        height=32,
        width=32,
    ).images
    pictures = pipeline.numpy_to_pil(np.asarray(output.reshape((num_samples,) + output.shape[-3:])))
    noise = jax.random.normal(create_key(1), (1, 4, 16, 16))
    one = pipeline(
        prompt_ids[:1], processed_image[:1], params, create_key(2), 0.5, 6, 32, 32, noise=noise, return_dict=False
    )[0]
    return {"output": output, "pictures": np.stack([np.asarray(picture) for picture in pictures]) / 255, "one": one}
