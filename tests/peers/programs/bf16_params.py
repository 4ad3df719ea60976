"""Parameters in half precision, some kept whole, and what the models then compute in."""

import jax
import jax.numpy as jnp
from diffusers import FlaxAutoencoderKL, FlaxStableDiffusionPipeline, FlaxUNet2DConditionModel
from flax import traverse_util
from transformers import FlaxCLIPTextModel


def dtypes(tree):
    leaves = jax.tree_util.tree_leaves(tree)
    return jnp.array([sum(leaf.dtype == dtype for leaf in leaves) for dtype in (jnp.float32, jnp.bfloat16)])


def main(folder):
    base = f"{folder}/sd"
    unet, params = FlaxUNet2DConditionModel.from_pretrained(
        base, subfolder="unet", revision="bf16", dtype=jnp.bfloat16, local_files_only=True
    )
    flat_params = traverse_util.flatten_dict(params)
    mask = {path: path[-2:] not in {("norm1", "scale"), ("norm1", "bias")} for path in flat_params}
    masked = unet.to_bf16(params, traverse_util.unflatten_dict(mask))
    half = unet.to_bf16(params)
    key = jax.random.PRNGKey(0)
    sample, context = jax.random.normal(key, (2, 4, 8, 8)), jax.random.normal(key, (2, 12, 32))
    prediction = unet.apply({"params": half}, sample, jnp.array([1, 900], jnp.int32), context).sample
    vae, vae_params = FlaxAutoencoderKL.from_pretrained(base, subfolder="vae", dtype=jnp.bfloat16)
    whole = vae.to_fp32(vae.to_fp16(vae_params))
    text_encoder = FlaxCLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=jnp.bfloat16)
    text_encoder.params = text_encoder.to_bf16(text_encoder.params)
    hidden = text_encoder(jnp.ones((1, 12), jnp.int32))[0]
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
        base, revision="bf16", dtype=jnp.bfloat16, safety_checker=None, feature_extractor=None
    )
    ids = pipeline.prepare_inputs("a red cat")
    scheduler_state = params.pop("scheduler")
    params = jax.tree_util.tree_map(lambda x: x.astype(jnp.bfloat16), params)
    params["scheduler"] = scheduler_state
    images = pipeline(ids, params, key, 2, guidance_scale=2.0).images
    assert hidden.dtype == jnp.bfloat16
    return {
        "masked": dtypes(masked),
        "half": dtypes(half),
        "vae": whole["encoder"]["conv_in"]["kernel"],
        "bf16 prediction": prediction.astype(jnp.float32),
        "bf16 hidden": hidden.astype(jnp.float32),
        "bf16 images": images.astype(jnp.float32),
    }
