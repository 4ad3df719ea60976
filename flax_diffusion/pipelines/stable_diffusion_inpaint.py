"""Masked parts of pictures drawn anew, by Stable Diffusion 1.x and 2.x with UNets of 9 input channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.pipelines.denoising import decode, denoise, encode, start_latents
from flax_diffusion.pipelines.images import Pictures, as_list, to_array, to_masks
from flax_diffusion.pipelines.outputs import FlaxStableDiffusionPipelineOutput
from flax_diffusion.pipelines.running import layout_of, run
from flax_diffusion.pipelines.stable_diffusion import FlaxStableDiffusionPipelineBase, Prompts, embed_prompts


def _draw(
    parts: Mapping[str, Any],
    params: Any,
    keys: Array,
    arrays: Mapping[str, Array],
    *,
    height: int,
    width: int,
    steps: int,
    dtype: Any,
) -> Array:
    unet, scheduler = parts["unet"], parts["scheduler"]
    context = embed_prompts(parts, params, arrays)
    masked, mask = arrays["masked_image"], arrays["mask"]
    masked = jax.image.resize(masked, (*masked.shape[:2], height, width), "bicubic")
    split = jax.vmap(jax.random.split)(keys)
    clean = encode(parts, params, masked, split[:, 1])
    mask = jax.image.resize(mask, (*mask.shape[:2], height, width), "nearest")
    mask = jax.image.resize(mask, (*mask.shape[:2], *clean.shape[-2:]), "nearest")
    latents = start_latents(arrays.get("latents"), keys, clean.shape, dtype)
    state = scheduler.set_timesteps(params["scheduler"], steps, clean.shape)
    latents = latents.astype(jnp.float32) * state.init_noise_sigma
    fixed = jnp.concatenate([mask, clean], axis=1)
    fixed = jnp.concatenate([fixed, fixed])

    def predict(sample: Array, timesteps: Array) -> Array:
        sample = jnp.concatenate([sample, fixed.astype(sample.dtype)], axis=1)
        return unet.apply({"params": params["unet"]}, sample, timesteps, context).sample

    latents = denoise(scheduler, state, predict, latents, arrays["guidance_scale"], split[:, 0], steps=steps)
    return decode(parts, params, latents)


class FlaxStableDiffusionInpaintPipeline(FlaxStableDiffusionPipelineBase):
    """Masked parts of pictures drawn anew; for the arguments see `FlaxStableDiffusionPipelineBase`.

    The input of the UNet is latents, a mask and latents of the masked picture.

    Reference:
        StableDiffusionInpaintPipeline of Diffusers (PyTorch); Rombach et al. 2022, section 4.5.
    """

    torch_class: ClassVar[str] = "StableDiffusionInpaintPipeline"

    def prepare_inputs(self, prompt: Prompts, image: Pictures, mask: Pictures) -> tuple[np.ndarray, Array, Array]:
        """Return token ids, masked pictures and masks.

        Args:
            prompt: One prompt, or several.
            image: One Pillow picture, or one for each prompt, all of one size.
            mask: One Pillow picture of that size, or one for each; what is lighter than half is drawn anew.

        Returns:
            Token ids, integers (N, L); pictures in [-1, 1] with zeros under the mask, float32 (N, 3, H, W); and masks,
            0 or 1, float32 (N, 1, H, W). H and W are multiples of 32. `__call__` takes masks before pictures.

        Raises:
            ConfigError: If the prompt is neither.
            DataError: If pictures are neither, or the sizes or numbers differ.
        """
        pixels, masks = to_array(as_list(image, "image"), 32), to_masks(as_list(mask, "mask"), 32)
        if pixels.shape[-2:] != masks.shape[-2:]:
            sizes = ["{1}x{0}".format(*array.shape[-2:]) for array in (pixels, masks)]
            raise DataError(f"image is {sizes[0]} and mask {sizes[1]} (in multiples of 32): resize one to the other")
        if len(masks) not in (1, len(pixels)) and len(pixels) != 1:
            raise DataError(f"{len(pixels)} pictures have {len(masks)} masks: give one mask, or one for each picture")
        return self.tokenize(prompt), (2 * pixels - 1) * (masks < 0.5), masks

    def __call__(
        self,
        prompt_ids: Any,
        mask: Any,
        masked_image: Any,
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
        """Draw a picture for each prompt that keeps what is not masked.

        Args:
            prompt_ids: See `FlaxStableDiffusionPipeline`.
            mask: Masks, 1 where a picture is drawn anew, (N, 1, H, W), or (D, B, 1, H, W).
            masked_image: Pictures in [-1, 1], zero under the mask, (N, 3, H, W), or (D, B, 3, H, W).
            params: See `FlaxStableDiffusionPipeline`.
            prng_seed: See `FlaxStableDiffusionPipeline`.
            num_inference_steps: Denoising steps.
            height: Height of the pictures in pixels, to which picture and mask are resized; None for the one that the
                UNet was trained at.
            width: Width, likewise.
            guidance_scale: See `FlaxStableDiffusionPipeline`.
            latents: Noise to start from, (N, C, h, w); None draws it.
            neg_prompt_ids: See `FlaxStableDiffusionPipeline`.
            return_dict: Return a dataclass; False returns a tuple.
            jit: Divide the pictures over all devices; False uses one.

        Returns:
            The pictures, and what the safety checker says of them.

        Raises:
            ConfigError: If inputs do not fit each other, the models or the devices.
            WeightsError: If the parameters are not those of the models.
        """
        layout = layout_of(prompt_ids, 2, jit)
        height, width = self.size(height, width)
        channels = 2 * self.vae.latent_channels + 1
        if self.unet.in_channels != channels:
            raise ConfigError(
                f"the UNet has {self.unet.in_channels} input channels, and one that inpaints has {channels} (latents, "
                "mask, latents of the masked picture): use the UNet of an inpainting model"
            )
        pictures = {"mask": mask, "masked_image": masked_image}
        arrays = self.inputs(layout, prompt_ids, neg_prompt_ids, guidance_scale, latents=latents, **pictures)
        sizes = {name: arrays[name].shape[-2:] for name in pictures}
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"mask and masked_image differ in height and width ({sizes}): resize one to the other")
        settings = {"height": height, "width": width, "steps": num_inference_steps, "dtype": jnp.dtype(self.dtype)}
        images = run(self.parts(), _draw, layout, params, prng_seed, arrays, **settings)
        return self.finish(layout, images, params, return_dict)
