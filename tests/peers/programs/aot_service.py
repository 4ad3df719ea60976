"""A server compiles its program before the first request: lowered from the pipeline's own function."""

import jax
import numpy as np
from diffusers import FlaxStableDiffusionPipeline, FlaxStableDiffusionXLPipeline
from flax.jax_utils import replicate
from jax import pmap

STEPS, SIZE = 3, 16


def prepare(pipeline, prompt, negative_prompt, seed):
    ids, neg_ids = (pipeline.prepare_inputs([text]) for text in (prompt, negative_prompt))
    rng = jax.random.split(jax.random.PRNGKey(seed), jax.device_count())
    return replicate(ids), replicate(neg_ids), rng


def aot_compile(pipeline, p_params, last):
    ids, neg_ids, rng = prepare(pipeline, "", "", 0)
    guidance = replicate(np.full((1,), 7.5, np.float32))
    return (
        pmap(pipeline._generate, static_broadcasted_argnums=[3, 4, 5, 9][: 3 + len(last)])
        .lower(ids, p_params, rng, STEPS, SIZE, SIZE, guidance, None, neg_ids, *last)
        .compile()
    )


def main(folder):
    images = {}
    for name, cls, last in (("sd", FlaxStableDiffusionPipeline, ()), ("sdxl", FlaxStableDiffusionXLPipeline, (False,))):
        none = {} if last else {"safety_checker": None, "feature_extractor": None}
        pipeline, params = cls.from_pretrained(f"{folder}/{name}", **none)
        p_params = replicate(params)
        p_generate = aot_compile(pipeline, p_params, last)
        for request, prompt in enumerate(["a red cat", "a blue dog"]):
            ids, neg_ids, rng = prepare(pipeline, prompt, "bad", request)
            guidance = replicate(np.full((1,), 5.0, np.float32))
            images[f"images {name} {prompt}"] = p_generate(ids, p_params, rng, guidance, None, neg_ids)
        assert len(images[f"images {name} {prompt}"].addressable_shards) == jax.device_count()
    return images
