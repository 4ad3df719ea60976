"""Pictures along the edges of another one; the ControlNet is loaded apart from the rest."""

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxControlNetModel, FlaxStableDiffusionControlNetPipeline
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from PIL import Image, ImageFilter


def main(folder):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    canny_image = picture.filter(ImageFilter.FIND_EDGES)
    controlnet, controlnet_params = FlaxControlNetModel.from_pretrained(
        f"{folder}/control/controlnet", from_pt=True, dtype=jnp.float32
    )
    pipe, params = FlaxStableDiffusionControlNetPipeline.from_pretrained(
        f"{folder}/control", controlnet=controlnet, dtype=jnp.float32, safety_checker=None, feature_extractor=None
    )
    params["controlnet"] = controlnet_params
    num_samples = jax.device_count()
    rng = jax.random.split(jax.random.PRNGKey(0), num_samples)
    prompt_ids = pipe.prepare_text_inputs(["a red dog"] * num_samples)
    negative_prompt_ids = pipe.prepare_text_inputs(["cat"] * num_samples)
    processed_image = pipe.prepare_image_inputs([canny_image] * num_samples)
    p_params = replicate(params)
    output = pipe(
        prompt_ids=shard(prompt_ids),
        image=shard(processed_image),
        params=p_params,
        prng_seed=rng,
        num_inference_steps=3,
        neg_prompt_ids=shard(negative_prompt_ids),
        controlnet_conditioning_scale=0.8,
        jit=True,
    ).images
    images = pipe.numpy_to_pil(np.asarray(output.reshape((num_samples,) + output.shape[-3:])))
    assert images[0].size == (64, 64)
    return {"output": output, "control": processed_image}
