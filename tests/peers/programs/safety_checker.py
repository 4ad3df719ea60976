"""Pictures checked by the pipeline, and by its checker alone."""

import warnings

import jax
import numpy as np
from diffusers import FlaxStableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker_flax import FlaxStableDiffusionSafetyChecker
from transformers import CLIPImageProcessor


def main(folder):
    base = f"{folder}/safe"
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(base)
    prompt_ids = pipeline.prepare_inputs(["a red cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = pipeline(prompt_ids, params, jax.random.PRNGKey(0), num_inference_steps=2)
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
    found["unchecked"] = pipeline(prompt_ids, params, jax.random.PRNGKey(0), num_inference_steps=2)[0]
    return found
