"""A square in the middle of a picture painted anew."""

import jax
import numpy as np
from diffusers import FlaxStableDiffusionInpaintPipeline
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from PIL import Image


def main(folder):
    init_image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask_image = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))
    pipeline, params = FlaxStableDiffusionInpaintPipeline.from_pretrained(
        f"{folder}/inpaint", safety_checker=None, feature_extractor=None
    )
    prng_seed = jax.random.PRNGKey(0)
    num_samples = jax.device_count()
    prompt, init_image, mask_image = (num_samples * [value] for value in ("a blue dog", init_image, mask_image))
    prompt_ids, processed_masked_images, processed_masks = pipeline.prepare_inputs(prompt, init_image, mask_image)
    params = replicate(params)
    prng_seed = jax.random.split(prng_seed, num_samples)
    images = pipeline(
        shard(prompt_ids),
        shard(processed_masks),
        shard(processed_masked_images),
        params,
        prng_seed,
        4,
        height=64,
        width=64,
        jit=True,
    ).images
    return {"images": images.reshape((num_samples,) + images.shape[-3:]), "masks": processed_masks}
