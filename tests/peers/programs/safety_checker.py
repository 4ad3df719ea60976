"""Pictures checked by the pipeline, and by its checker alone."""

import warnings

import jax
import numpy as np
from diffusers import FlaxStableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker_flax import FlaxStableDiffusionSafetyChecker
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from transformers import CLIPImageProcessor


def main(folder):
    base = f"{folder}/safe"
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(base)
    num_samples = jax.device_count()
    prompt_ids = shard(pipeline.prepare_inputs(["a red cat"] * num_samples))
    params, keys = replicate(params), jax.random.split(jax.random.PRNGKey(0), num_samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = pipeline(prompt_ids, params, keys, num_inference_steps=2, jit=True)
    checker, checker_params = FlaxStableDiffusionSafetyChecker.from_pretrained(
        base, subfolder="safety_checker", _do_init=False
    )
    extractor = CLIPImageProcessor.from_pretrained(base, subfolder="feature_extractor")
    picture = np.random.default_rng(0).uniform(size=(1, 16, 16, 3))
    features = extractor(pipeline.numpy_to_pil(picture), return_tensors="np").pixel_values
    found = {
        "features": features,
        "alone": np.asarray(checker(features, params=checker_params)),
        "flagged": np.asarray(output.nsfw_content_detected),
        "brightest": np.max(output.images),
    }
    pipeline.safety_checker = None
    found["unchecked"] = pipeline(prompt_ids, params, keys, num_inference_steps=2, jit=True)[0]
    return found
