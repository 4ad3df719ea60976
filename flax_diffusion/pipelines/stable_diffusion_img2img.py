"""Pictures from a picture and a prompt, by Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.pipelines.denoising import decode, denoise, encode, start_latents
from flax_diffusion.pipelines.images import Pictures, as_list, to_array
from flax_diffusion.pipelines.outputs import FlaxStableDiffusionPipelineOutput
from flax_diffusion.pipelines.running import layout_of, run
from flax_diffusion.pipelines.stable_diffusion import FlaxStableDiffusionPipelineBase, Prompts, embed_prompts


def _draw(
    parts: Mapping[str, Any], params: Any, keys: Array, arrays: Mapping[str, Array], *, start: int, steps: int
) -> Array:
    unet, scheduler = parts["unet"], parts["scheduler"]
    context = embed_prompts(parts, params, arrays)
    clean = encode(parts, params, arrays["image"], keys)
    state = scheduler.set_timesteps(params["scheduler"], steps, clean.shape)
    noise = start_latents(arrays.get("noise"), keys, clean.shape)
    # Where nothing is denoised, nothing is to be noised either.
    latents = clean
    if start < steps:
        first = jnp.broadcast_to(state.timesteps[start], clean.shape[:1])
        latents = scheduler.add_noise(state, clean.astype(jnp.float32), noise, first)

    def predict(sample: Array, timesteps: Array) -> Array:
        return unet.apply({"params": params["unet"]}, sample, timesteps, context).sample

    scale = arrays["guidance_scale"]
    latents = denoise(scheduler, state, predict, latents, scale, keys, steps=steps, start=start)
    return decode(parts, params, latents)


class FlaxStableDiffusionImg2ImgPipeline(FlaxStableDiffusionPipelineBase):
    """Pictures from a picture and a prompt; for the arguments see `FlaxStableDiffusionPipelineBase`.

    Reference:
        StableDiffusionImg2ImgPipeline of Diffusers (PyTorch); Meng et al. 2021 (SDEdit).
    """

    torch_class: ClassVar[str] = "StableDiffusionImg2ImgPipeline"

    def prepare_inputs(self, prompt: Prompts, image: Pictures) -> tuple[np.ndarray, Array]:
        """Return token ids and pictures as the pipeline takes them.

        Args:
            prompt: One prompt, or several.
            image: One Pillow picture, or one for each prompt, all of one size.

        Returns:
            Token ids, integers (N, L), and pictures in [-1, 1], float32 (N, 3, H, W), H and W multiples of 32.

        Raises:
            ConfigError: If the prompt is neither.
            DataError: If the image is neither, or the sizes differ.
        """
        pixels = to_array(as_list(image, "image"), 32)
        return self.tokenize(prompt), 2 * pixels - 1

    @staticmethod
    def get_timestep_start(num_inference_steps: int, strength: float) -> int:
        """Return how many of the first steps are left out.

        Args:
            num_inference_steps: Denoising steps.
            strength: Share of the steps that is taken, from 0 to 1.

        Raises:
            ConfigError: If the strength is not from 0 to 1.
        """
        if not 0 <= strength <= 1:
            raise ConfigError(f"strength is {strength}: it must be from 0 (the picture itself) to 1 (noise alone)")
        return num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)

    def __call__(
        self,
        prompt_ids: Any,
        image: Any,
        params: Mapping[str, Any],
        prng_seed: Any,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: Any = 7.5,
        noise: Any = None,
        neg_prompt_ids: Any = None,
        return_dict: bool = True,
        jit: bool = False,
    ) -> FlaxStableDiffusionPipelineOutput | tuple[np.ndarray, Any]:
        """Draw a picture for each prompt, which starts from a noisy picture.

        Args:
            prompt_ids: See `FlaxStableDiffusionPipeline`.
            image: Pictures in [-1, 1], (N, 3, H, W), or (D, B, 3, H, W).
            params: See `FlaxStableDiffusionPipeline`.
            prng_seed: See `FlaxStableDiffusionPipeline`.
            strength: Share of the denoising steps that is taken, from 0 to 1.
            num_inference_steps: Denoising steps, of which the first are left out.
            height: Height of the pictures in pixels; None for that of `image`, which it must be.
            width: Width, likewise.
            guidance_scale: See `FlaxStableDiffusionPipeline`.
            noise: Noise to add, (N, C, h, w); None draws it.
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
        pixels = layout.flat(image, "image")
        self.size(*pixels.shape[-2:])
        if (height or pixels.shape[-2], width or pixels.shape[-1]) != pixels.shape[-2:]:
            raise ConfigError(
                f"height {height} and width {width} are not those of image, {pixels.shape[-2]} and "
                f"{pixels.shape[-1]}: leave them out, or resize the picture"
            )
        arrays = self.inputs(layout, prompt_ids, neg_prompt_ids, guidance_scale, noise=noise) | {"image": pixels}
        start = self.get_timestep_start(num_inference_steps, strength)
        images = run(self.parts(), _draw, layout, params, prng_seed, arrays, start=start, steps=num_inference_steps)
        return self.finish(layout, images, params, return_dict)
