"""Pictures from prompts and a picture that steers, by Stable Diffusion 1.x and 2.x with a ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from flax_diffusion.pipelines.denoising import decode, denoise, start_latents
from flax_diffusion.pipelines.images import Pictures, as_list, to_array
from flax_diffusion.pipelines.outputs import FlaxStableDiffusionPipelineOutput
from flax_diffusion.pipelines.running import layout_of, run
from flax_diffusion.pipelines.stable_diffusion import FlaxStableDiffusionPipelineBase, Prompts, embed_prompts


def _draw(
    parts: Mapping[str, Any], params: Any, keys: Array, arrays: Mapping[str, Array], *, steps: int, factor: int
) -> Array:
    unet, controlnet, scheduler = parts["unet"], parts["controlnet"], parts["scheduler"]
    context = embed_prompts(parts, params, arrays)
    image = jnp.concatenate([arrays["image"], arrays["image"]])
    strength = jnp.concatenate([arrays["controlnet_scale"], arrays["controlnet_scale"]]).reshape(-1, 1, 1, 1)
    height, width = image.shape[-2:]
    shape = (len(arrays["prompt_ids"]), unet.in_channels, height // factor, width // factor)
    state = scheduler.set_timesteps(params["scheduler"], steps, shape)
    latents = start_latents(arrays.get("latents"), keys, shape) * state.init_noise_sigma

    def predict(sample: Array, timesteps: Array) -> Array:
        inputs = (sample, timesteps, context)
        control = {"params": params["controlnet"]}
        down, mid = controlnet.apply(control, *inputs, image, conditioning_scale=strength, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return unet.apply({"params": params["unet"]}, *inputs, **residuals).sample

    latents = denoise(scheduler, state, predict, latents, arrays["guidance_scale"], keys, steps=steps)
    return decode(parts, params, latents)


class FlaxStableDiffusionControlNetPipeline(FlaxStableDiffusionPipelineBase):
    """Pictures from prompts and a picture that steers.

    Args:
        controlnet: ControlNet, after the UNet; for the others see `FlaxStableDiffusionPipelineBase`.

    Reference:
        StableDiffusionControlNetPipeline of Diffusers (PyTorch); Zhang et al. 2023.
    """

    torch_class: ClassVar[str] = "StableDiffusionControlNetPipeline"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        controlnet: Any,
        scheduler: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        dtype: Any = jnp.float32,
    ):
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, dtype)
        self.controlnet = controlnet

    def prepare_text_inputs(self, prompt: Prompts) -> np.ndarray:
        """Return the token ids of prompts, integers (N, L)."""
        return self.tokenize(prompt)

    def prepare_image_inputs(self, image: Pictures) -> Array:
        """Return pictures that steer as the pipeline takes them.

        Args:
            image: One Pillow picture, or one for each prompt, all of one size.

        Returns:
            Pictures in [0, 1], float32 (N, 3, H, W), H and W multiples of 64.

        Raises:
            DataError: If the image is neither, or the sizes differ.
        """
        return to_array(as_list(image, "image"), 64)

    def __call__(
        self,
        prompt_ids: Any,
        image: Any,
        params: Mapping[str, Any],
        prng_seed: Any,
        num_inference_steps: int = 50,
        guidance_scale: Any = 7.5,
        latents: Any = None,
        neg_prompt_ids: Any = None,
        controlnet_conditioning_scale: Any = 1.0,
        return_dict: bool = True,
        jit: bool = False,
    ) -> FlaxStableDiffusionPipelineOutput | tuple[np.ndarray, Any]:
        """Draw a picture for each prompt, of the size of the picture that steers.

        Args:
            prompt_ids: See `FlaxStableDiffusionPipeline`.
            image: Pictures in [0, 1], (N, 3, H, W), or (D, B, 3, H, W).
            params: See `FlaxStableDiffusionPipeline`.
            prng_seed: See `FlaxStableDiffusionPipeline`.
            num_inference_steps: Denoising steps.
            guidance_scale: See `FlaxStableDiffusionPipeline`.
            latents: Noise to start from, (N, C, h, w); None draws it.
            neg_prompt_ids: See `FlaxStableDiffusionPipeline`.
            controlnet_conditioning_scale: Factor of what the ControlNet adds: a number, or one for each device or
                picture.
            return_dict: Return a dataclass; False returns a tuple.
            jit: Divide the pictures over all devices; False uses one.

        Returns:
            The pictures, and what the safety checker says of them.

        Raises:
            ConfigError: If inputs do not fit each other, the models or the devices.
            WeightsError: If the parameters are not those of the models.
        """
        layout = layout_of(prompt_ids, 2, jit)
        control = layout.flat(image, "image")
        self.size(*control.shape[-2:])
        scale = layout.number(controlnet_conditioning_scale, "controlnet_conditioning_scale")
        arrays = self.inputs(layout, prompt_ids, neg_prompt_ids, guidance_scale, latents=latents)
        arrays |= {"image": control, "controlnet_scale": scale}
        settings = {"steps": num_inference_steps, "factor": self.vae_scale_factor}
        images = run(self.parts("controlnet"), _draw, layout, params, prng_seed, arrays, **settings)
        return self.finish(layout, images, params, return_dict)
