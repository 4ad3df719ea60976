"""Calls of the pipelines: what goes in, pictures on two devices and on one, files."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from model_calls import shapes, today
from PIL import Image
from registry import call, normal

FOLDERS = {
    "FlaxStableDiffusionPipeline": "sd",
    "FlaxStableDiffusionImg2ImgPipeline": "sd",
    "FlaxStableDiffusionInpaintPipeline": "inpaint",
    "FlaxStableDiffusionControlNetPipeline": "control",
    "FlaxStableDiffusionXLPipeline": "xl",
}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4


def picture(seed, width=40, height=36):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def mask(width=40, height=36):
    pixels = np.zeros((height, width), np.uint8)
    pixels[: height // 2] = 255
    return Image.fromarray(pixels)


def without_checker(name):
    return {} if name == "FlaxStableDiffusionXLPipeline" else {"safety_checker": None}


def opened(package, name, **options):
    """A pipeline without its safety checker, and the parameters."""
    return package.open(name, FOLDERS[name], **without_checker(name) | options)


def control_picture(seed):
    return picture(seed, 70, 66)


def prepared(pipe, name, prompts):
    """What `prepare_inputs` and its kin give, in the order in which the pipeline is called."""
    count = len(prompts)
    if name == "FlaxStableDiffusionImg2ImgPipeline":
        return pipe.prepare_inputs(prompts, [picture(seed) for seed in range(count)])
    if name == "FlaxStableDiffusionInpaintPipeline":
        ids, images, masks = pipe.prepare_inputs(prompts, [picture(seed) for seed in range(count)], [mask()] * count)
        return ids, masks, images
    if name == "FlaxStableDiffusionControlNetPipeline":
        return pipe.prepare_text_inputs(prompts), pipe.prepare_image_inputs(
            [control_picture(seed) for seed in range(count)]
        )
    return (pipe.prepare_inputs(prompts),)


def sizes(name, height=16, width=24):
    if name == "FlaxStableDiffusionControlNetPipeline":
        return {}
    fixed = name in ("FlaxStableDiffusionImg2ImgPipeline", "FlaxStableDiffusionInpaintPipeline")
    return {"height": 32, "width": 32} if fixed else {"height": height, "width": width}


def negatives(pipe, name, prompts):
    if name == "FlaxStableDiffusionControlNetPipeline":
        return pipe.prepare_text_inputs(prompts)
    return (
        pipe.tokenizer(
            prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="np"
        ).input_ids
        if name != "FlaxStableDiffusionXLPipeline"
        else pipe.prepare_inputs(prompts)
    )


def on_two(pipe, name, params, prompts=("abc", "x yz"), **options):
    """`jit=True` with everything replicated or sharded."""
    inputs = [shard(jnp.asarray(one)) for one in prepared(pipe, name, list(prompts))]
    keys = jax.random.split(jax.random.PRNGKey(0), jax.device_count())
    return pipe(*inputs, replicate(params), keys, num_inference_steps=STEPS, **sizes(name), jit=True, **options)


def on_one(pipe, name, params, prompts=("abc",), **options):
    inputs = prepared(pipe, name, list(prompts))
    return pipe(*inputs, params, jax.random.PRNGKey(0), num_inference_steps=STEPS, **sizes(name) | options)


def of_every_pipeline(name):
    """What is the same for all."""

    @call(f"{name}.from_pretrained")
    def _(package):
        pipe, params = opened(package, name)
        trees = {key: shapes(value) for key, value in params.items() if key != "scheduler"}
        return (
            trees,
            type(params["scheduler"]).__name__,
            {
                part: type(value).__name__.removesuffix(
                    "Pil"
                )  # of Transformers 5, whose image processors say how they work
                for part, value in pipe.components.items()
            },
        )

    @call(f"{name}.from_pretrained: dtype")
    def _(package):
        pipe, params = opened(package, name, dtype=jnp.bfloat16)
        return {key: shapes(value) for key, value in params.items() if key != "scheduler"}, str(pipe.unet.dtype)

    @call(f"{name}.from_pretrained: no such folder")
    def _(package):
        return getattr(package, name).from_pretrained(str(package.folder / "nothing"))

    @call(f"{name}.components")
    def _(package):
        pipe, _ = opened(package, name)
        return sorted(getattr(package, name)(**pipe.components).components)

    @call(f"{name}.__call__: jit, two devices")
    def _(package):
        return on_two(*_with(package, name)).images

    @call(f"{name}.__call__: one device")
    def _(package):
        return on_one(*_with(package, name)).images

    @call(f"{name}.__call__: one device, two prompts")
    def _(package):
        return on_one(*_with(package, name), prompts=("abc", "x yz")).images

    @call(f"{name}.__call__: guidance_scale and neg_prompt_ids")
    def _(package):
        pipe, _, params = _with(package, name)
        return on_one(pipe, name, params, guidance_scale=3.0, neg_prompt_ids=negatives(pipe, name, ["no"])).images

    @call(f"{name}.__call__: jit, guidance_scale and neg_prompt_ids")
    def _(package):
        pipe, _, params = _with(package, name)
        ids = shard(negatives(pipe, name, ["no", "not"]))
        return on_two(pipe, name, params, guidance_scale=3.0, neg_prompt_ids=ids).images

    @call(f"{name}.__call__: a tuple")
    def _(package):
        return on_one(*_with(package, name), return_dict=False)

    @call(f"{name}.save_pretrained")
    def _(package):
        pipe, params = opened(package, name)
        new = package.new_folder()
        pipe.save_pretrained(new, params=params)
        again, read = getattr(package, name).from_pretrained(new, **without_checker(name))
        return {key: today(value) for key, value in read.items() if key != "scheduler"}, sorted(again.components)

    @call(f"{name}.save_pretrained: names of files")
    def _(package):
        pipe, params = opened(package, name)
        new = package.new_folder()
        pipe.save_pretrained(new, params=params)
        return sorted(str(path.relative_to(new)) for path in new.rglob("*.*") if path.suffix not in (".txt", ".jinja"))

    @call(f"{name}.numpy_to_pil")
    def _(package):
        pictures = np.random.default_rng(0).uniform(0, 1, (2, 8, 6, 3)).astype(np.float32)
        found = getattr(package, name).numpy_to_pil(pictures) + getattr(package, name).numpy_to_pil(pictures[0])
        grey = getattr(package, name).numpy_to_pil(pictures[..., :1])
        return [np.asarray(one) for one in found + grey], [one.mode for one in found + grey]

    @call(f"{name}.progress_bar")
    def _(package):
        pipe, _ = opened(package, name)
        pipe.set_progress_bar_config(disable=True)
        return list(pipe.progress_bar([1, 2, 3]))

    @call(f"{name}.set_progress_bar_config")
    def _(package):
        return opened(package, name)[0].set_progress_bar_config(disable=True)


def _with(package, name):
    pipe, params = opened(package, name)
    return pipe, name, params


def of_inputs(name):
    """`prepare_inputs` and what it refuses."""

    @call(f"{name}.prepare_inputs")
    def _(package):
        return prepared(opened(package, name)[0], name, ["a b", "a much longer prompt than fits"])

    @call(f"{name}.prepare_inputs: one prompt")
    def _(package):
        pipe, _ = opened(package, name)
        pictures = prepared(pipe, name, ["a b"])[1:]
        given = {0: (), 1: (picture(0),), 2: (picture(0), mask())}[len(pictures)]
        return pipe.prepare_inputs("a b", *given)

    @call(f"{name}.prepare_inputs: a number for a prompt")
    def _(package):
        pipe, _ = opened(package, name)
        given = {0: (), 1: (picture(0),), 2: (picture(0), mask())}[len(prepared(pipe, name, ["a"])) - 1]
        return pipe.prepare_inputs(7, *given)


for _name in FOLDERS:
    of_every_pipeline(_name)
    if _name != "FlaxStableDiffusionControlNetPipeline":
        of_inputs(_name)


for _method, _good in (("prepare_text_inputs", ["a b", "c"]), ("prepare_image_inputs", [control_picture(0)])):

    @call(f"FlaxStableDiffusionControlNetPipeline.{_method}")
    def _(package, method=_method, good=_good):
        pipe, _ = opened(package, "FlaxStableDiffusionControlNetPipeline")
        return getattr(pipe, method)(good), getattr(pipe, method)(good[0])

    @call(f"FlaxStableDiffusionControlNetPipeline.{_method}: a number")
    def _(package, method=_method):
        return getattr(opened(package, "FlaxStableDiffusionControlNetPipeline")[0], method)(7)


@call("FlaxStableDiffusionControlNetPipeline.__call__: controlnet_conditioning_scale")
def _(package):
    name = "FlaxStableDiffusionControlNetPipeline"
    return on_one(*_with(package, name), controlnet_conditioning_scale=0.5).images


@call("FlaxStableDiffusionImg2ImgPipeline.get_timestep_start")
def _(package):
    pipe, _ = opened(package, "FlaxStableDiffusionImg2ImgPipeline")
    return [pipe.get_timestep_start(steps, strength) for steps in (1, 7, 50) for strength in (0.0, 0.3, 0.8, 1.0)]


@call("FlaxStableDiffusionImg2ImgPipeline.__call__: strength and noise")
def _(package):
    pipe, name, params = _with(package, "FlaxStableDiffusionImg2ImgPipeline")
    return on_one(pipe, name, params, strength=0.5, noise=jnp.asarray(normal(1, 1, 4, 16, 16))).images


for _name in ("FlaxStableDiffusionPipeline", "FlaxStableDiffusionXLPipeline"):

    @call(f"{_name}.__call__: latents")
    def _(package, name=_name):
        return on_one(*_with(package, name), latents=jnp.asarray(normal(1, 1, 4, 8, 12))).images

    @call(f"{_name}.__call__: latents of another shape")
    def _(package, name=_name):
        return on_one(*_with(package, name), latents=jnp.asarray(normal(1, 1, 4, 8, 8))).images

    @call(f"{_name}.__call__: a height that 8 does not divide")
    def _(package, name=_name):
        return on_one(*_with(package, name), height=20).images

    @call(f"{_name}.__call__: the model's own size")
    def _(package, name=_name):
        return on_one(*_with(package, name), height=None, width=None).images

    for _scheduler, _config in {
        "FlaxDDIMScheduler": {"clip_sample": False, "steps_offset": 1},
        "FlaxDPMSolverMultistepScheduler": {},
        "FlaxDDPMScheduler": {"variance_type": "fixed_large"},
        "FlaxEulerDiscreteScheduler": {},
        "FlaxLMSDiscreteScheduler": {},
    }.items():

        @call(f"{_name}.__call__: {_scheduler}")
        def _(package, name=_name, scheduler=_scheduler, config=_config):
            made = getattr(package, scheduler).from_config({"_class_name": scheduler, **SD, **config})
            pipe, params = opened(package, name, scheduler=made)
            return on_one(pipe, name, params | {"scheduler": made.create_state()}).images


@call("FlaxStableDiffusionPipeline.__call__: Euler, leading")
def _(package):
    config = SD | {"timestep_spacing": "leading", "steps_offset": 1}
    made = package.FlaxEulerDiscreteScheduler.from_config(config)
    pipe, params = opened(package, "FlaxStableDiffusionPipeline", scheduler=made)
    return on_one(pipe, "FlaxStableDiffusionPipeline", params | {"scheduler": made.create_state()}).images


@call("FlaxStableDiffusionXLPipeline.get_embeddings")
def _(package):
    pipe, params = opened(package, "FlaxStableDiffusionXLPipeline")
    return pipe.get_embeddings(pipe.prepare_inputs(["a b", "c"]), params)


@call("FlaxStableDiffusionXLPipeline.__call__: output_type latent")
def _(package):
    pipe, name, params = _with(package, "FlaxStableDiffusionXLPipeline")
    return on_one(pipe, name, params, output_type="latent").images


for _name in list(FOLDERS)[:4]:

    @call(f"{_name}.from_pretrained: with the safety checker")
    def _(package, name=_name):
        pipe, params = package.open(name, FOLDERS[name])
        return shapes(params["safety_checker"]), type(pipe.safety_checker).__name__

    @call(f"{_name}.__call__: jit, with the safety checker")
    def _(package, name=_name):
        pipe, params = package.open(name, FOLDERS[name])
        found = on_two(pipe, name, params)
        return found.images, np.asarray(found.nsfw_content_detected)

    @call(f"{_name}.__call__: one device, with the safety checker")
    def _(package, name=_name):
        pipe, params = package.open(name, FOLDERS[name])
        found = on_one(pipe, name, params)
        return found.images, np.asarray(found.nsfw_content_detected)


@call("FlaxDiffusionPipeline.from_pretrained")
def _(package):
    kinds = {}
    for folder in ("sd", "inpaint", "control"):
        pipe, params = package.FlaxDiffusionPipeline.from_pretrained(str(package.folder / folder), safety_checker=None)
        kinds[folder] = type(pipe).__name__, sorted(params)
    return kinds


@call("FlaxDiffusionPipeline.from_pretrained: SDXL")
def _(package):
    pipe, params = package.FlaxDiffusionPipeline.from_pretrained(str(package.folder / "xl"))
    return type(pipe).__name__, sorted(params)


@call("FlaxDiffusionPipeline.numpy_to_pil")
def _(package):
    pictures = np.random.default_rng(0).uniform(0, 1, (2, 8, 6, 3)).astype(np.float32)
    return [np.asarray(one) for one in package.FlaxDiffusionPipeline.numpy_to_pil(pictures)]


@call("FlaxDiffusionPipeline.progress_bar")
def _(package):
    pipe, _ = opened(package, "FlaxStableDiffusionPipeline")
    package.FlaxDiffusionPipeline.set_progress_bar_config(pipe, disable=True)
    return list(package.FlaxDiffusionPipeline.progress_bar(pipe, [1, 2]))


@call("FlaxDiffusionPipeline.set_progress_bar_config")
def _(package):
    pipe, _ = opened(package, "FlaxStableDiffusionPipeline")
    return package.FlaxDiffusionPipeline.set_progress_bar_config(pipe, disable=True)


@call("FlaxDiffusionPipeline.save_pretrained")
def _(package):
    pipe, params = package.FlaxDiffusionPipeline.from_pretrained(str(package.folder / "sd"), safety_checker=None)
    new = package.new_folder()
    pipe.save_pretrained(new, params)
    return type(package.FlaxDiffusionPipeline.from_pretrained(new, safety_checker=None)[0]).__name__
