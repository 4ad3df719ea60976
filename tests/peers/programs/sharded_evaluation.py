"""Pictures for an evaluation: parameters on every device of a mesh, prompts divided over it, no pmap."""

import jax
import numpy as np
from diffusers import FlaxStableDiffusionPipeline
from PIL import Image


def main(folder):
    key = jax.random.key(0)
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    no_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
        f"{folder}/torch", from_pt=True, safety_checker=None, feature_extractor=None
    )
    params = jax.tree.map(lambda x: jax.device_put(x, no_sharding), params)
    made = []
    for prompt in ("a red cat", "a blue dog"):
        key, subkey = jax.random.split(key)
        prompt_ids = jax.device_put(pipeline.prepare_inputs([prompt] * jax.device_count()), sharding)
        images = pipeline(prompt_ids, params, subkey, num_inference_steps=3, guidance_scale=np.array([7.5])).images
        images = np.asarray(images.reshape((images.shape[0],) + images.shape[-3:]))
        assert Image.fromarray((images[0] * 255.0).astype(np.uint8)).size == (16, 16)
        made.append(images)
    return {"images": np.stack(made)}
