"""Pictures from prompts, by Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.pipelines.denoising import decode, denoise, start_latents
from flax_diffusion.pipelines.outputs import FlaxStableDiffusionPipelineOutput
from flax_diffusion.pipelines.pipeline import FlaxDiffusionPipeline
from flax_diffusion.pipelines.running import BATCH, Layout, layout_of, of_each, run

Prompts = str | list[str]


class FlaxStableDiffusionPipelineBase(FlaxDiffusionPipeline):
    """What the pipelines of Stable Diffusion 1.x and 2.x share: parts, prompts, guidance and the safety checker.

    Args:
        vae: Autoencoder.
        text_encoder: CLIP's text encoder.
        tokenizer: CLIP's tokenizer.
        unet: UNet.
        scheduler: Any scheduler of `flax_diffusion.schedulers` for noise on latents.
        safety_checker: Network that flags pictures; None for none.
        feature_extractor: What prepares pictures for the safety checker; None without one.
        dtype: Dtype of the computation.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        dtype: Any = jnp.float32,
    ):
        super().__init__(dtype)
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.scheduler, self.safety_checker, self.feature_extractor = scheduler, safety_checker, feature_extractor

    def parts(self, *more: str) -> dict[str, Any]:
        """Return what a program needs, by name: the models of all these pipelines, the scheduler, and others."""
        return {name: getattr(self, name) for name in ("text_encoder", "unet", "vae", "scheduler", *more)}

    def inputs(
        self, layout: Layout, prompt_ids: Any, neg_prompt_ids: Any, guidance_scale: Any, **others: Any
    ) -> dict[str, Array]:
        """Return the inputs of a program, each with one batch axis.

        Args:
            layout: How the inputs of the call lie.
            prompt_ids: Token ids, integers (N, L), or with an axis of devices.
            neg_prompt_ids: Token ids to guide away from, likewise; None for those of an empty prompt.
            guidance_scale: A number, or one for each device or picture.
            others: Further inputs by name; None for one that is not given.
        """
        ids = layout.flat(prompt_ids, "prompt_ids")
        if neg_prompt_ids is None:
            negative_ids = layout.put(self.no_prompt(*ids.shape), BATCH)
        else:
            negative_ids = layout.flat(neg_prompt_ids, "neg_prompt_ids")
        scale = layout.number(guidance_scale, "guidance_scale")
        given = {name: layout.flat(array, name) for name, array in others.items() if array is not None}
        return {"prompt_ids": ids, "negative_ids": negative_ids, "guidance_scale": scale} | given

    def tokenize(self, prompt: Prompts) -> np.ndarray:
        """Return the token ids of prompts, padded and cut off to the tokenizer's length, integers (N, L).

        Args:
            prompt: One prompt, or several.

        Raises:
            ConfigError: If it is anything else.
        """
        return token_ids(self.tokenizer, prompt)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of pictures, in pixels.

        Args:
            height: Height; None for the one that the UNet was trained at.
            width: Width; None for the same.

        Raises:
            ConfigError: If one is not a multiple of the autoencoder's factor.
        """
        return picture_size(self.unet, self.vae_scale_factor, height, width)

    def no_prompt(self, count: int, length: int) -> np.ndarray:
        """Return the token ids of empty prompts, integers (count, length)."""
        return np.repeat(token_ids(self.tokenizer, [""], length), count, axis=0)

    def finish(
        self, layout: Layout, images: Array, params: Mapping[str, Any], return_dict: bool
    ) -> FlaxStableDiffusionPipelineOutput | tuple[np.ndarray, Any]:
        """Return pictures as the user gets them, after the safety checker.

        Args:
            layout: How the inputs of the call lay.
            images: Pictures in [0, 1], (N, H, W, 3).
            params: Parameters by part.
            return_dict: Return a dataclass; False returns a tuple.
        """
        flagged: Any = False
        if self.safety_checker is not None:
            host = np.array(images)
            flagged = self._flag(layout, host, params)
            host[np.asarray(flagged)] = 0
            if any(flagged):
                warnings.warn(
                    f"the safety checker flagged {sum(flagged)} of {len(flagged)} pictures, which are black: use "
                    "another prompt or seed, or safety_checker=None",
                    stacklevel=3,
                )
            images = jnp.asarray(host)
        made = layout.outputs(images)
        return FlaxStableDiffusionPipelineOutput(made, flagged) if return_dict else (made, flagged)

    def _flag(self, layout: Layout, images: np.ndarray, params: Mapping[str, Any]) -> list[bool]:
        seen = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in images]
        pixels = self.feature_extractor(seen, return_tensors="np").pixel_values
        arrays = {"pixels": layout.put(np.asarray(pixels), BATCH)}
        parts = {"safety_checker": self.safety_checker}
        return np.asarray(run(parts, _check_pictures, layout, params, None, arrays)).tolist()


def _check_pictures(parts: Mapping[str, Any], params: Any, keys: None, arrays: Mapping[str, Array]) -> Array:
    del keys
    return parts["safety_checker"](arrays["pixels"], params=params["safety_checker"])


def token_ids(tokenizer: Any, prompt: Prompts, max_length: int | None = None) -> np.ndarray:
    """Return the token ids of prompts, padded and cut off, integers (N, L).

    Args:
        tokenizer: The tokenizer.
        prompt: One prompt, or several.
        max_length: Number of tokens; None for the tokenizer's.

    Raises:
        ConfigError: If the prompt is anything else.
    """
    if not isinstance(prompt, (str, list)):
        raise ConfigError(f"prompt is {type(prompt).__name__}: give a string, or a list of strings")
    length = max_length or tokenizer.model_max_length
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids


def picture_size(unet: Any, factor: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the height and width of pictures, in pixels.

    Args:
        unet: The UNet, whose sample_size is the default.
        factor: Pixels of a latent's side.
        height: Height; None for the default.
        width: Width; None for the default.

    Raises:
        ConfigError: If one is not a multiple of the factor, or there is no default.
    """
    if None in (height, width) and unet.config.sample_size is None:
        raise ConfigError("the UNet's config has no sample_size: give height and width")
    default = np.broadcast_to(unet.config.sample_size or 0, 2).tolist()
    sizes = height or default[0] * factor, width or default[1] * factor
    if any(size % factor for size in sizes):
        raise ConfigError(f"height {sizes[0]} and width {sizes[1]} must be multiples of {factor}: change them")
    return sizes


def embed_prompts(parts: Mapping[str, Any], params: Any, arrays: Mapping[str, Array]) -> Array:
    """Return what the UNet attends to, for negative prompts and then for prompts, (2·N, L, D).

    Args:
        parts: With the text encoder as "text_encoder".
        params: Parameters by part.
        arrays: `negative_ids` and `prompt_ids`, integers (N, L).
    """
    ids = jnp.concatenate([arrays["negative_ids"], arrays["prompt_ids"]])
    return parts["text_encoder"](ids, params=params["text_encoder"])[0]


def _draw(
    parts: Mapping[str, Any],
    params: Any,
    keys: Array,
    arrays: Mapping[str, Array],
    *,
    height: int,
    width: int,
    steps: int,
    factor: int,
) -> Array:
    unet, scheduler = parts["unet"], parts["scheduler"]
    context = embed_prompts(parts, params, arrays)
    shape = (len(arrays["prompt_ids"]), unet.in_channels, height // factor, width // factor)
    state = scheduler.set_timesteps(params["scheduler"], steps, shape)
    latents = start_latents(arrays.get("latents"), keys, shape) * state.init_noise_sigma

    def predict(sample: Array, timesteps: Array) -> Array:
        return unet.apply({"params": params["unet"]}, sample, timesteps, context).sample

    latents = denoise(scheduler, state, predict, latents, arrays["guidance_scale"], keys, steps=steps)
    return decode(parts, params, latents)


class FlaxStableDiffusionPipeline(FlaxStableDiffusionPipelineBase):
    """Pictures from prompts; for the arguments see `FlaxStableDiffusionPipelineBase`.

    Reference:
        StableDiffusionPipeline of Diffusers (PyTorch); Rombach et al. 2022.
    """

    torch_class: ClassVar[str] = "StableDiffusionPipeline"

    def prepare_inputs(self, prompt: Prompts) -> np.ndarray:
        """Return the token ids of prompts, integers (N, L)."""
        return self.tokenize(prompt)

    def __call__(
        self,
        prompt_ids: Any,
        params: Mapping[str, Any],
        prng_seed: Any,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: Any = 7.5,
        latents: Any = None,
        neg_prompt_ids: Any = None,
        return_dict: bool = True,
        jit: bool = False,
    ) -> FlaxStableDiffusionPipelineOutput | tuple[np.ndarray, Any]:
        """Draw a picture for each prompt.

        Args:
            prompt_ids: Token ids, integers (N, L); or (D, B, L) for D devices, as `flax.training.common_utils.shard`
                gives, with `jit=True`, and then all other arrays, and the parameters, have that axis too.
            params: Parameters by part, and the scheduler's state.
            prng_seed: Random key; one for each device where `prompt_ids` has an axis of devices.
            num_inference_steps: Denoising steps.
            height: Height of the pictures in pixels; None for the one that the UNet was trained at.
            width: Width, likewise.
            guidance_scale: Scale of classifier-free guidance: a number, or one for each device or picture.
            latents: Noise to start from, (N, C, h, w); None draws it.
            neg_prompt_ids: Token ids of prompts to guide away from; None for empty ones.
            return_dict: Return a dataclass; False returns a tuple.
            jit: Divide the pictures over all devices; False uses one. Both are compiled.

        Returns:
            The pictures, and what the safety checker says of them.

        Raises:
            ConfigError: If inputs do not fit each other, the models or the devices.
            WeightsError: If the parameters are not those of the models.
        """
        layout = layout_of(prompt_ids, 2, jit)
        height, width = self.size(height, width)
        arrays = self.inputs(layout, prompt_ids, neg_prompt_ids, guidance_scale, latents=latents)
        settings = {"height": height, "width": width, "steps": num_inference_steps, "factor": self.vae_scale_factor}
        images = run(self.parts(), _draw, layout, params, prng_seed, arrays, **settings)
        return self.finish(layout, images, params, return_dict)

    def _generate(
        self,
        prompt_ids: Any,
        params: Mapping[str, Any],
        prng_seed: Array,
        num_inference_steps: int,
        height: int,
        width: int,
        guidance_scale: Any,
        latents: Any = None,
        neg_prompt_ids: Any = None,
    ) -> Array:
        """Return the pictures of one device, in [0, 1], float32 (N, H, W, 3).

        A call runs the same function. Servers that compile before their first request give this one to `jax.pmap` or
        `jax.jit`, with the steps, height and width static.

        Args:
            prompt_ids: Token ids, integers (N, L).
            params: Parameters by part, and the scheduler's state.
            prng_seed: Random key.
            num_inference_steps: Denoising steps.
            height: Height of the pictures in pixels.
            width: Width.
            guidance_scale: Scale of classifier-free guidance: a number, or one for each picture.
            latents: Noise to start from, (N, C, h, w); None draws it.
            neg_prompt_ids: Token ids of prompts to guide away from, integers (N, L); None for empty ones.
        """
        height, width = self.size(height, width)
        negative_ids = self.no_prompt(*prompt_ids.shape) if neg_prompt_ids is None else neg_prompt_ids
        arrays = {"prompt_ids": prompt_ids, "negative_ids": negative_ids}
        arrays |= {"guidance_scale": of_each(guidance_scale, len(prompt_ids))}
        arrays |= {} if latents is None else {"latents": latents}
        settings = {"height": height, "width": width, "steps": num_inference_steps, "factor": self.vae_scale_factor}
        return _draw(self.components, params, prng_seed[None], arrays, **settings)
