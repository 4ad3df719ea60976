"""Compiles the sampling of Stable Diffusion 1.5 for one TPU v5e, as our pipeline or Diffusers 0.39's does it.

    python tests/peers/sampling_cost.py ours|reference CONFIGS OUT

Eight pictures of 512 pixels, 50 steps of DDIM under guidance, in bfloat16; weights are described only. `CONFIGS` holds
sd15_unet.json and its like, `OUT` gets the compiled program as text. Needs libtpu, and no TPU.
"""

import functools
import json
import os
import sys
from pathlib import Path

IMAGES, STEPS, SIZE, LENGTH = 8, 50, 512, 77
TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def device():
    """The description of one chip."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1), num_slices=1
    ).devices[0]


def configs(folder, part):
    """The content of a published config, without notes of the program that wrote it."""
    values = json.loads((Path(folder) / f"sd15_{part}.json").read_text())
    return {key: value for key, value in values.items() if not key.startswith("_")}


def lowered(which, folder):
    """The sampling of all pictures, lowered for one chip."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if which == "ours":
        import flax_diffusion as package
        from flax_diffusion import FlaxCLIPTextModel
    else:
        import diffusers as package
        from transformers import FlaxCLIPTextModel
    from transformers import CLIPTextConfig

    mesh = Mesh(np.array([device()]), ("batch",))
    place = NamedSharding(mesh, PartitionSpec())

    def described(tree, dtype=None):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place), tree)

    dtype = jnp.bfloat16
    unet = package.FlaxUNet2DConditionModel.from_config(configs(folder, "unet"), dtype=dtype)
    vae = package.FlaxAutoencoderKL.from_config(configs(folder, "vae"), dtype=dtype)
    text = CLIPTextConfig(**configs(folder, "text_encoder"))
    text_encoder = FlaxCLIPTextModel(text, _do_init=False)
    scheduler = package.FlaxDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipe = package.FlaxStableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, dtype=dtype,
    )  # fmt: skip
    key = jax.random.PRNGKey(0)
    shapes = {
        "unet": jax.eval_shape(unet.init_weights, key) if which != "ours" else unet.params_shape(),
        "vae": jax.eval_shape(vae.init_weights, key) if which != "ours" else vae.params_shape(),
        "text_encoder": text_encoder.params_shape_tree,
    }
    params = described(shapes, dtype) | {"scheduler": described(jax.eval_shape(scheduler.create_state))}
    ids = jax.ShapeDtypeStruct((IMAGES, LENGTH), jnp.int32, sharding=place)
    scale = jax.ShapeDtypeStruct((IMAGES,) if which == "ours" else (), jnp.float32, sharding=place)
    if which == "ours":
        from flax_diffusion.pipelines import running, stable_diffusion

        settings = {"height": SIZE, "width": SIZE, "steps": STEPS, "factor": pipe.vae_scale_factor}
        static = (running.Parts(pipe.parts()), stable_diffusion._draw, mesh, False, tuple(sorted(settings.items())))
        keys = jax.ShapeDtypeStruct((1, 2), jnp.uint32, sharding=place)
        arrays = {"prompt_ids": ids, "negative_ids": ids, "guidance_scale": scale}
        return running._program.lower(*static, params, keys, arrays)
    generate = functools.partial(pipe._generate, num_inference_steps=STEPS, height=SIZE, width=SIZE, latents=None)
    seed = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=place)
    call = jax.jit(lambda ids, params, seed, scale, away: generate(
        prompt_ids=ids, params=params, prng_seed=seed, guidance_scale=scale, neg_prompt_ids=away
    ))  # fmt: skip
    return call.lower(ids, params, seed, scale, ids)


def main(which, folder, out):
    """Compile, and write the program."""
    os.environ.update(TPU)
    compiled = lowered(which, folder).compile()
    costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
    Path(out).write_text(compiled.as_text())
    print(json.dumps({"flops": costs["flops"], "accessed": costs["bytes accessed"], "temp": memory.temp_size_in_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
