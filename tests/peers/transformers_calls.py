"""Calls of Transformers' models: CLIP, T5's encoder and the safety checker."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
from model_calls import files, kernels, shapes
from registry import call, normal

IDS = np.array([[512, 70, 71, 513, 513, 513, 513, 513], [512, 80, 81, 82, 83, 84, 85, 513]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [1] * 8], np.int32)
FIVE = IDS % 60
PIXELS = (2, 3, 8, 8)
FOLDERS = {
    "FlaxCLIPTextModel": "sd/text_encoder",
    "FlaxCLIPTextModelWithProjection": "text_projection",
    "FlaxCLIPModel": "clip",
    "FlaxCLIPVisionModel": "vision",
    "FlaxT5EncoderModel": "t5",
    "FlaxStableDiffusionSafetyChecker": "sd/safety_checker",
}
SHAPES = {
    "FlaxCLIPTextModel": (1, 8), "FlaxCLIPTextModelWithProjection": (1, 8), "FlaxCLIPModel": ((1, 8), (1, 8, 8, 3)),
    "FlaxCLIPVisionModel": (1, 8, 8, 3), "FlaxT5EncoderModel": (1, 8),
    "FlaxStableDiffusionSafetyChecker": (1, 224, 224, 3),
}  # fmt: skip
INPUTS = {
    "FlaxCLIPTextModel": (IDS,), "FlaxCLIPTextModelWithProjection": (IDS,), "FlaxCLIPModel": (IDS, normal(0, *PIXELS)),
    "FlaxCLIPVisionModel": (normal(0, *PIXELS),), "FlaxT5EncoderModel": (FIVE,),
    "FlaxStableDiffusionSafetyChecker": (normal(0, 12, 3, 224, 224),),
}  # fmt: skip
CONFIGS = {
    "FlaxCLIPTextModel": ("CLIPTextConfig", ("hidden_size", "vocab_size", "hidden_act", "eos_token_id")),
    "FlaxCLIPTextModelWithProjection": ("CLIPTextConfig", ("hidden_size", "projection_dim", "hidden_act")),
    "FlaxCLIPModel": ("CLIPConfig", ("projection_dim", "logit_scale_init_value")),
    "FlaxCLIPVisionModel": ("CLIPVisionConfig", ("hidden_size", "image_size", "patch_size")),
    "FlaxT5EncoderModel": ("T5Config", ("d_model", "num_layers", "feed_forward_proj")),
    "FlaxStableDiffusionSafetyChecker": ("CLIPConfig", ("projection_dim",)),
}


def opened(package, name, **options):
    return package.open(name, FOLDERS[name], _do_init=False, **options)


def outputs(found):
    """The outputs by name that are not None; one array as it is."""
    if not hasattr(found, "keys"):
        return found
    return {key: outputs(found[key]) for key in found.keys() if found[key] is not None}  # noqa: SIM118


def of_every_model(name):
    """What all take from `FlaxPreTrainedModel`."""

    def config_of(model):
        return {key: getattr(model.config, key) for key in CONFIGS[name][1]}

    @call(f"{name}.from_pretrained: _do_init=False")
    def _(package):
        model, params = opened(package, name)
        return params, config_of(model)

    @call(f"{name}.from_pretrained")
    def _(package):
        model = package.open(name, FOLDERS[name])
        return model.params, config_of(model), sorted("/".join(path) for path in model.required_params)

    @call(f"{name}.from_pretrained: dtype")
    def _(package):
        model = package.open(name, FOLDERS[name], dtype=jnp.bfloat16)
        return model.params, str(jnp.dtype(model.dtype))

    @call(f"{name}.from_pretrained: no such folder")
    def _(package):
        return getattr(package, name).from_pretrained(str(package.folder / "nothing"))

    @call(f"{name}.__call__")
    def _(package):
        model, params = opened(package, name)
        return outputs(model(*INPUTS[name], params=params))

    @call(f"{name}.__call__: by its own weights")
    def _(package):
        return outputs(package.open(name, FOLDERS[name])(*INPUTS[name]))

    @call(f"{name}.init_weights")
    def _(package):
        model, _ = opened(package, name)
        return shapes(jax.eval_shape(lambda key: model.init_weights(key, SHAPES[name]), jax.random.PRNGKey(0)))

    @call(f"{name}.save_pretrained")
    def _(package):
        model, params = opened(package, name)
        new = package.new_folder()
        model.save_pretrained(new, params=params)
        again, read = getattr(package, name).from_pretrained(new, _do_init=False)
        return config_of(again), read

    @call(f"{name}.save_pretrained: names of files")
    def _(package):
        model, params = opened(package, name)
        new = package.new_folder()
        model.save_pretrained(new, params=params)
        return files(new)

    @call(f"{name}.save_pretrained: safe_serialization")
    def _(package):
        model, params = opened(package, name)
        new = package.new_folder()
        model.save_pretrained(new, params=params, safe_serialization=True)
        return getattr(package, name).from_pretrained(new, _do_init=False)[1]

    @call(f"{name}.enable_gradient_checkpointing")
    def _(package):
        model, params = getattr(package, name).from_pretrained(str(package.folder / FOLDERS[name]), _do_init=False)
        model.enable_gradient_checkpointing()
        return outputs(model(*INPUTS[name], params=params))

    for method in ("to_bf16", "to_fp16", "to_fp32"):

        @call(f"{name}.{method}")
        def _(package, method=method):
            model, params = opened(package, name)
            return getattr(model, method)(params)

        @call(f"{name}.{method}: mask")
        def _(package, method=method):
            model, params = opened(package, name)
            half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
            return getattr(model, method)(half, kernels(params))


def of_config(name):
    """A model from its configuration alone."""

    @call(f"{name}.from_config, or its constructor")
    def _(package):
        config = getattr(importlib.import_module("transformers"), CONFIGS[name][0])
        read = config.from_pretrained(str(package.folder / FOLDERS[name]))
        model = getattr(package, name)(read, seed=0, dtype=jnp.float32)
        return shapes(model.params), shapes(model.params_shape_tree)


def of_an_encoder(name):
    """Hidden states, attentions and tuples, and dropout's arguments."""

    @call(f"{name}.__call__: hidden states and attentions")
    def _(package):
        model, params = opened(package, name)
        options = {"output_hidden_states": True, "output_attentions": True}
        return outputs(model(*INPUTS[name], params=params, **options))

    @call(f"{name}.__call__: a tuple")
    def _(package):
        model, params = opened(package, name)
        return model(*INPUTS[name], params=params, return_dict=False)

    @call(f"{name}.__call__: train")
    def _(package):
        model, params = opened(package, name)
        found = model(*INPUTS[name], params=params, dropout_rng=jax.random.PRNGKey(1), train=True)
        return list(found[0].shape)

    @call(f"{name}.__call__: jitted, gradients")
    def _(package):
        model, params = opened(package, name)

        def loss(params):
            return (model(*INPUTS[name], params=params, train=False)[0] ** 2).mean()

        return jax.jit(jax.grad(loss))(params)


for _name in FOLDERS:
    of_every_model(_name)
    of_config(_name)
    if _name != "FlaxStableDiffusionSafetyChecker":
        of_an_encoder(_name)


for _name in ("FlaxCLIPTextModel", "FlaxCLIPTextModelWithProjection", "FlaxT5EncoderModel"):

    @call(f"{_name}.__call__: attention_mask")
    def _(package, name=_name):
        model, params = opened(package, name)
        return model(*INPUTS[name], attention_mask=MASK, params=params)[0]


for _name in ("FlaxCLIPTextModel", "FlaxCLIPTextModelWithProjection"):

    @call(f"{_name}.__call__: position_ids")
    def _(package, name=_name):
        model, params = opened(package, name)
        places = np.array([[1, 0, 2, 3, 4, 5, 6, 7]] * 2)
        return model(IDS, position_ids=places, params=params)[0], model(IDS, MASK, places, params)[0]


@call("FlaxCLIPModel.get_text_features")
def _(package):
    model, params = opened(package, "FlaxCLIPModel")
    return model.get_text_features(IDS, params=params), model.get_text_features(IDS, MASK, params=params)


@call("FlaxCLIPModel.get_image_features")
def _(package):
    model, params = opened(package, "FlaxCLIPModel")
    return model.get_image_features(normal(0, *PIXELS), params=params)


@call("FlaxT5EncoderModel.__call__: gated GELU")
def _(package):
    model, params = package.open("FlaxT5EncoderModel", "t5_gated", _do_init=False)
    return outputs(model(FIVE, MASK, params=params))
