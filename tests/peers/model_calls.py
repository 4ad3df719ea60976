"""Calls of Diffusers' models: the autoencoder, the UNet, the ControlNet."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from registry import call, normal

TIMES = np.array([7, 801], np.int32)
FOLDERS = {
    "FlaxAutoencoderKL": "sd/vae",
    "FlaxUNet2DConditionModel": "sd/unet",
    "FlaxControlNetModel": "control/controlnet",
}
CONFIGS = {
    "FlaxAutoencoderKL": {
        "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 16), "layers_per_block": 1,
        "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16, "scaling_factor": 0.2,
    },
    "FlaxUNet2DConditionModel": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32,), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        "only_cross_attention": False, "attention_head_dim": 2, "cross_attention_dim": 16, "dropout": 0.0,
        "use_linear_projection": False, "flip_sin_to_cos": True, "freq_shift": 0,
    },
    "FlaxControlNetModel": {
        "sample_size": 8, "in_channels": 4, "block_out_channels": (32,), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",), "only_cross_attention": False, "attention_head_dim": 2,
        "cross_attention_dim": 16, "dropout": 0.0, "use_linear_projection": False, "flip_sin_to_cos": True,
        "freq_shift": 0, "controlnet_conditioning_channel_order": "rgb",
        "conditioning_embedding_out_channels": (8, 8, 8, 8),
    },
}  # fmt: skip
"""Of 0.39's constructors."""


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out_0"}
"""Of the autoencoder's attention in 0.39, and in PyTorch's class and here."""


def today(tree):
    """Parameters by the names of today."""
    flat = flatten_dict(unfreeze(tree))
    return unflatten_dict({tuple(OLD_NAMES.get(part, part) for part in path): leaf for path, leaf in flat.items()})


def shapes(tree):
    return {"/".join(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flatten_dict(today(tree)).items()}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def kernels(params):
    """A mask that is true for kernels."""
    return unflatten_dict({path: path[-1] == "kernel" for path in flatten_dict(params)})


def of_every_model(name, folder, values):
    """What all three take from `FlaxModelMixin` and `ConfigMixin`."""

    saved = [key for key in values if name != "FlaxControlNetModel" or key not in ("sample_size", "dropout")]

    def config_of(config):
        return {key: config[key] for key in values}

    @call(f"{name}.from_pretrained")
    def _(package):
        model, params = package.open(name, folder)
        return today(params), config_of(model.config), str(jnp.dtype(model.dtype))

    @call(f"{name}.from_pretrained: names of parameters")
    def _(package):
        return sorted("/".join(path) for path in flatten_dict(package.open(name, folder)[1]))

    @call(f"{name}.from_pretrained: dtype, by position")
    def _(package):
        model, params = getattr(package, name).from_pretrained(str(package.folder / folder), jnp.bfloat16)
        return today(params), str(jnp.dtype(model.dtype))

    @call(f"{name}.from_pretrained: subfolder, and a changed key")
    def _(package):
        top, below = folder.split("/")
        found = getattr(package, name).from_pretrained(str(package.folder / top), subfolder=below, sample_size=24)
        return found[0].config["sample_size"], today(found[1])

    @call(f"{name}.from_pretrained: no such folder")
    def _(package):
        return getattr(package, name).from_pretrained(str(package.folder / "nothing"))

    @call(f"{name}.from_config")
    def _(package):
        model = getattr(package, name).from_config(values)
        return config_of(model.config), [getattr(model, key) for key in values]

    @call(f"{name}.from_config: return_unused_kwargs")
    def _(package):
        model, unused = getattr(package, name).from_config(values, return_unused_kwargs=True, other=3)
        return config_of(model.config), unused

    @call(f"{name}.from_config: dtype")
    def _(package):
        return str(jnp.dtype(getattr(package, name).from_config(values, dtype=jnp.bfloat16).dtype))

    @call(f"{name}.load_config")
    def _(package):
        found = getattr(package, name).load_config(str(package.folder / folder))
        return {key: value for key, value in found.items() if not key.startswith("_")}

    @call(f"{name}.load_config: return_unused_kwargs")
    def _(package):
        found, unused = getattr(package, name).load_config(
            str(package.folder / folder), return_unused_kwargs=True, other=3
        )
        return found["sample_size"], unused

    @call(f"{name}.save_config")
    def _(package):
        new = package.new_folder()
        getattr(package, name)(**values).save_config(new)
        return files(new), config_of(getattr(package, name).load_config(str(new)))

    @call(f"{name}.to_json_string")
    def _(package):
        read = json.loads(getattr(package, name)(**values).to_json_string())
        return {key: read[key] for key in saved}

    @call(f"{name}.to_json_file")
    def _(package):
        file = package.new_folder() / "any.json"
        getattr(package, name)(**values).to_json_file(file)
        read = json.loads(file.read_text())
        return {key: read[key] for key in saved}

    @call(f"{name}.init_weights")
    def _(package):
        return shapes(jax.eval_shape(getattr(package, name)(**values).init_weights, jax.random.PRNGKey(0)))

    @call(f"{name}.init_weights: rng by name")
    def _(package):
        model = getattr(package, name)(**values)
        return shapes(jax.eval_shape(lambda key: model.init_weights(rng=key), jax.random.key(0)))

    @call(f"{name}.save_pretrained")
    def _(package):
        model, params = package.open(name, folder)
        new = package.new_folder()
        model.save_pretrained(new, params=params)
        again, read = getattr(package, name).from_pretrained(new)
        return config_of(again.config), today(read)

    @call(f"{name}.save_pretrained: names of files")
    def _(package):
        model, params = package.open(name, folder)
        new = package.new_folder()
        model.save_pretrained(new, params=params)
        return files(new)

    @call(f"{name}.save_pretrained: bfloat16")
    def _(package):
        model, params = package.open(name, folder)
        new = package.new_folder()
        model.save_pretrained(new, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
        return today(getattr(package, name).from_pretrained(new)[1])

    for method in ("to_bf16", "to_fp16", "to_fp32"):

        @call(f"{name}.{method}")
        def _(package, method=method):
            model, params = package.open(name, folder)
            return today(getattr(model, method)(params))

        @call(f"{name}.{method}: mask")
        def _(package, method=method):
            model, params = package.open(name, folder)
            half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
            return today(getattr(model, method)(half, kernels(params)))


for _name, _folder in FOLDERS.items():
    of_every_model(_name, _folder, CONFIGS[_name])


def autoencoder(package):
    model, params = package.open("FlaxAutoencoderKL", "sd/vae")
    return model, {"params": params}


def applied(model, variables, *arrays, **options):
    """`apply`, compiled."""
    return jax.jit(lambda variables, *arrays: model.apply(variables, *arrays, **options))(variables, *arrays)


def encoded(package, use, *pixels, method=None, **options):
    """What a function makes of the encodings of pictures, compiled as a whole: an encoding is no tree of arrays."""
    vae, variables = autoencoder(package)
    method = vae.encode if method is None else method
    make = jax.jit(lambda all_pixels: use(*(vae.apply(variables, one, method=method, **options) for one in all_pixels)))
    return make(pixels)


@call("FlaxAutoencoderKL.encode")
def _(package):
    def use(output):
        posterior = output.latent_dist
        return {name: getattr(posterior, name) for name in ("mean", "logvar", "std", "var")}

    return encoded(package, use, normal(0, 2, 3, 16, 16))


@call("FlaxAutoencoderKL.encode: latent_dist.sample and mode, as the scripts take them")
def _(package):
    vae, variables = autoencoder(package)
    posterior = vae.apply(variables, normal(0, 2, 3, 16, 16), deterministic=True, method=vae.encode).latent_dist
    latents = jnp.transpose(posterior.sample(jax.random.PRNGKey(3)), (0, 3, 1, 2))
    return posterior.sample(jax.random.PRNGKey(3)), posterior.mode(), latents * vae.config.scaling_factor


@call("FlaxAutoencoderKL.encode: latent_dist.kl and nll")
def _(package):
    def use(one, other):
        one, other = one.latent_dist, other.latent_dist
        sample = normal(2, *one.mean.shape)
        return one.kl(), one.kl(other), one.nll(sample), one.nll(sample, (1, 2))

    return encoded(package, use, normal(0, 2, 3, 16, 16), normal(1, 2, 3, 16, 16))


@call("FlaxAutoencoderKL.encode: a tuple")
def _(package):
    return encoded(package, lambda output: output[0].mean, normal(0, 1, 3, 16, 16), return_dict=False)


@call("FlaxAutoencoderKL.encode: the class's method")
def _(package):
    method = package.FlaxAutoencoderKL.encode
    return encoded(package, lambda output: output.latent_dist.mean, normal(0, 1, 3, 16, 16), method=method)


@call("FlaxAutoencoderKL.decode: channels first")
def _(package):
    vae, variables = autoencoder(package)
    return applied(vae, variables, normal(4, 2, 4, 8, 8), method=vae.decode).sample


@call("FlaxAutoencoderKL.decode: channels last")
def _(package):
    vae, variables = autoencoder(package)
    return applied(vae, variables, normal(4, 2, 8, 8, 4), method=vae.decode).sample


@call("FlaxAutoencoderKL.decode: a tuple")
def _(package):
    vae, variables = autoencoder(package)
    return applied(vae, variables, normal(4, 1, 4, 8, 8), deterministic=True, return_dict=False, method=vae.decode)


@call("FlaxAutoencoderKL.__call__")
def _(package):
    vae, variables = autoencoder(package)
    return applied(vae, variables, normal(0, 2, 3, 16, 16)).sample


@call("FlaxAutoencoderKL.__call__: a tuple")
def _(package):
    vae, variables = autoencoder(package)
    return applied(vae, variables, normal(0, 2, 3, 16, 16), return_dict=False)


@call("FlaxAutoencoderKL.__call__: sample_posterior")
def _(package):
    vae, variables = autoencoder(package)
    rngs = {"gaussian": jax.random.PRNGKey(5)}
    return applied(vae, variables, normal(0, 1, 3, 16, 16), sample_posterior=True, rngs=rngs).sample


def denoiser(package, folder="sd/unet", **options):
    model, params = package.open("FlaxUNet2DConditionModel", folder, **options)
    return model, {"params": params}


def inputs(tokens=6, features=16):
    return normal(10, 2, 4, 8, 8), jnp.asarray(TIMES), normal(11, 2, tokens, features)


@call("FlaxUNet2DConditionModel.__call__")
def _(package):
    unet, variables = denoiser(package)
    return applied(unet, variables, *inputs()).sample


@call("FlaxUNet2DConditionModel.__call__: a tuple, names")
def _(package):
    unet, variables = denoiser(package)
    sample, times, hidden = inputs()
    return unet.apply(variables, sample=sample, timesteps=times, encoder_hidden_states=hidden, return_dict=False)


@call("FlaxUNet2DConditionModel.__call__: one timestep")
def _(package):
    unet, variables = denoiser(package)
    sample, _, hidden = inputs()
    return unet.apply(variables, sample, 7, hidden).sample, unet.apply(variables, sample, jnp.float32(7), hidden).sample


@call("FlaxUNet2DConditionModel.__call__: split_head_dim")
def _(package):
    unet, variables = denoiser(package, split_head_dim=True)
    return applied(unet, variables, *inputs()).sample


@call("FlaxUNet2DConditionModel.__call__: use_memory_efficient_attention")
def _(package):
    unet, variables = denoiser(package, use_memory_efficient_attention=True)
    return applied(unet, variables, *inputs()).sample


@call("FlaxUNet2DConditionModel.__call__: linear projection")
def _(package):
    unet, variables = denoiser(package, "unet_linear")
    return applied(unet, variables, *inputs()).sample


@call("FlaxUNet2DConditionModel.__call__: train, shape")
def _(package):
    unet, variables = denoiser(package, "unet_linear")
    rngs = {"dropout": jax.random.PRNGKey(0)}
    still = applied(unet, variables, *inputs()).sample
    moved = applied(unet, variables, *inputs(), train=True, rngs=rngs).sample
    return list(moved.shape), str(moved.dtype), bool(jnp.abs(still - moved).max() > 1e-3)


@call("FlaxUNet2DConditionModel.__call__: train, the same dropout")
def _(package):
    unet, variables = denoiser(package, "unet_linear")
    return applied(unet, variables, *inputs(), train=True, rngs={"dropout": jax.random.PRNGKey(0)}).sample


@call("FlaxUNet2DConditionModel.__call__: SDXL's conditions")
def _(package):
    unet, variables = denoiser(package, "xl/unet")
    more = {"text_embeds": normal(12, 2, 12), "time_ids": np.array([[16, 16, 0, 0, 16, 16]] * 2, np.float32)}
    return applied(unet, variables, *inputs(features=32), added_cond_kwargs=more).sample


@call("FlaxUNet2DConditionModel.__call__: SDXL without its conditions")
def _(package):
    unet, variables = denoiser(package, "xl/unet")
    return applied(unet, variables, *inputs(features=32)).sample


@call("FlaxUNet2DConditionModel.__call__: gradients")
def _(package):
    unet, variables = denoiser(package)

    def loss(params):
        return (unet.apply({"params": params}, *inputs(), train=True).sample ** 2).mean()

    return jax.jit(jax.grad(loss))(variables["params"])


@call("FlaxUNet2DConditionModel.__call__: bfloat16")
def _(package):
    unet, variables = denoiser(package, dtype=jnp.bfloat16)
    sample = applied(unet, variables, *inputs()).sample
    return list(sample.shape), str(sample.dtype)


def control(package):
    model, params = package.open("FlaxControlNetModel", "control/controlnet")
    return model, {"params": params}


def steered(package, **options):
    """The residuals of a ControlNet for one picture."""
    model, variables = control(package)
    return applied(model, variables, *inputs(), normal(13, 2, 3, 64, 64), **options)


@call("FlaxControlNetModel.__call__")
def _(package):
    found = steered(package)
    return [*found.down_block_res_samples, found.mid_block_res_sample]


@call("FlaxControlNetModel.__call__: conditioning_scale, a tuple")
def _(package):
    down, mid = steered(package, conditioning_scale=0.5, return_dict=False)
    return [*down, mid]


@call("FlaxControlNetModel.__call__: bgr")
def _(package):
    _, variables = control(package)
    model, _ = package.open("FlaxControlNetModel", "control/controlnet", controlnet_conditioning_channel_order="bgr")
    return applied(model, variables, *inputs(), normal(13, 2, 3, 64, 64)).mid_block_res_sample


@call("FlaxUNet2DConditionModel.__call__: a ControlNet's residuals")
def _(package):
    down, mid = steered(package, return_dict=False)
    unet, variables = denoiser(package)
    return applied(
        unet, variables, *inputs(), down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
