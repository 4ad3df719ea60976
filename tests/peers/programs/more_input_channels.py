"""A UNet with more input channels than the pretrained one: the new ones start at zero."""

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import FlaxUNet2DConditionModel
from diffusers.models.modeling_flax_utils import FlaxModelMixin
from flax.core import freeze


def load_pretrained_unet(path, in_channels):
    model_def, params = FlaxUNet2DConditionModel.from_pretrained(path, dtype=np.float32, subfolder="unet")
    params = jax.device_get(params)
    old_conv_in = params["conv_in"]["kernel"]
    height, width, channels, out = old_conv_in.shape
    params["conv_in"]["kernel"] = np.zeros((height, width, in_channels, out), dtype=old_conv_in.dtype)
    params["conv_in"]["kernel"][:, :, :channels, :] = old_conv_in
    config = dict(model_def.config)
    config["in_channels"] = in_channels
    return FlaxUNet2DConditionModel(
        sample_size=config["sample_size"],
        in_channels=in_channels,
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        down_block_types=tuple(config["down_block_types"]),
        up_block_types=tuple(config["up_block_types"]),
        attention_head_dim=config["attention_head_dim"],
        cross_attention_dim=config["cross_attention_dim"],
        dtype=jnp.float32,
    ), params


def main(folder):
    unet, params = load_pretrained_unet(f"{folder}/sd", 8)
    assert isinstance(unet, FlaxModelMixin)
    fresh = unet.init_weights(jax.random.PRNGKey(1))
    assert jax.tree_util.tree_structure(dict(fresh)) == jax.tree_util.tree_structure(dict(params))
    key = jax.random.PRNGKey(0)
    sample, context = jax.random.normal(key, (2, 8, 8, 8)), jax.random.normal(key, (2, 12, 32))
    both = unet.apply({"params": freeze(params)}, sample, jnp.array([5, 700]), encoder_hidden_states=context)
    timestep = unet.apply({"params": params}, sample, 700, context, return_dict=False)[0]
    return {"both": both.sample, "timestep": timestep}
