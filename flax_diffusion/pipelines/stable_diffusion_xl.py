"""Pictures from prompts, by Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.pipelines.denoising import decode, denoise, start_latents
from flax_diffusion.pipelines.outputs import FlaxStableDiffusionXLPipelineOutput
from flax_diffusion.pipelines.pipeline import FlaxDiffusionPipeline
from flax_diffusion.pipelines.running import layout_of, of_each, run
from flax_diffusion.pipelines.stable_diffusion import Prompts, picture_size, token_ids


def embed_prompts(parts: Mapping[str, Any], params: Any, prompt_ids: Array) -> tuple[Array, Array]:
    """Return what the UNet attends to, and the pooled embedding.

    Args:
        parts: With both text encoders.
        params: Parameters by part.
        prompt_ids: Token ids of both tokenizers, integers (N, 2, L).

    Returns:
        The states before the last layer of both encoders, (N, L, D1 + D2), and the second one's embedding, (N, E).
    """
    states, embeds = [], None
    for place, name in enumerate(("text_encoder", "text_encoder_2")):
        output = parts[name](prompt_ids[:, place], params=params[name], output_hidden_states=True)
        states.append(output["hidden_states"][-2])
        embeds = output["text_embeds"] if name == "text_encoder_2" else embeds
    assert embeds is not None
    return jnp.concatenate(states, axis=-1), embeds


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
    decoded: bool,
) -> Array:
    unet, scheduler, count = parts["unet"], parts["scheduler"], len(arrays["prompt_ids"])
    states, embeds = embed_prompts(parts, params, arrays["prompt_ids"])
    if "negative_ids" in arrays:
        away_states, away_embeds = embed_prompts(parts, params, arrays["negative_ids"])
    else:
        away_states, away_embeds = jnp.zeros_like(states), jnp.zeros_like(embeds)
    context = jnp.concatenate([away_states, states])
    sizes = jnp.tile(jnp.asarray([[height, width, 0, 0, height, width]], embeds.dtype), (2 * count, 1))
    added = {"text_embeds": jnp.concatenate([away_embeds, embeds]), "time_ids": sizes}
    shape = (count, unet.in_channels, height // factor, width // factor)
    state = scheduler.set_timesteps(params["scheduler"], steps, shape)
    latents = start_latents(arrays.get("latents"), keys, shape) * state.init_noise_sigma

    def predict(sample: Array, timesteps: Array) -> Array:
        return unet.apply({"params": params["unet"]}, sample, timesteps, context, added).sample

    latents = denoise(scheduler, state, predict, latents, arrays["guidance_scale"], keys, steps=steps)
    return decode(parts, params, latents) if decoded else latents


class FlaxStableDiffusionXLPipeline(FlaxDiffusionPipeline):
    """Pictures from prompts, by two text encoders.

    Args:
        text_encoder: CLIP's text encoder.
        text_encoder_2: OpenCLIP's text encoder, with a projection.
        vae: Autoencoder.
        tokenizer: Tokenizer of the first encoder.
        tokenizer_2: Tokenizer of the second.
        unet: UNet.
        scheduler: Any scheduler of `flax_diffusion.schedulers` for noise on latents.
        dtype: Dtype of the computation.

    Reference:
        StableDiffusionXLPipeline of Diffusers (PyTorch); Podell et al. 2023. As in Diffusers' Flax, pictures are guided
        away from zeros where no negative prompt is given.
    """

    torch_class: ClassVar[str] = "StableDiffusionXLPipeline"

    def __init__(
        self,
        text_encoder: Any,
        text_encoder_2: Any,
        vae: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        dtype: Any = jnp.float32,
    ):
        super().__init__(dtype)
        self.text_encoder, self.text_encoder_2, self.vae = text_encoder, text_encoder_2, vae
        self.tokenizer, self.tokenizer_2, self.unet, self.scheduler = tokenizer, tokenizer_2, unet, scheduler

    def prepare_inputs(self, prompt: Prompts) -> Array:
        """Return the token ids of prompts by both tokenizers, integers (N, 2, L).

        Args:
            prompt: One prompt, or several.

        Raises:
            ConfigError: If it is neither.
        """
        length = self.tokenizer.model_max_length
        both = [token_ids(tokenizer, prompt, length) for tokenizer in (self.tokenizer, self.tokenizer_2)]
        return jnp.stack([jnp.asarray(ids) for ids in both], axis=1)

    def get_embeddings(self, prompt_ids: Any, params: Mapping[str, Any]) -> tuple[Array, Array]:
        """Return what the UNet attends to, (N, L, D), and the pooled embedding, (N, E).

        Args:
            prompt_ids: Token ids, integers (N, 2, L).
            params: Parameters by part.
        """
        return embed_prompts(self.components, params, prompt_ids)

    def __call__(
        self,
        prompt_ids: Any,
        params: Mapping[str, Any],
        prng_seed: Any,
        num_inference_steps: int = 50,
        guidance_scale: Any = 7.5,
        height: int | None = None,
        width: int | None = None,
        latents: Any = None,
        neg_prompt_ids: Any = None,
        return_dict: bool = True,
        output_type: str | None = None,
        jit: bool = False,
    ) -> FlaxStableDiffusionXLPipelineOutput | tuple[np.ndarray]:
        """Draw a picture for each prompt.

        Args:
            prompt_ids: Token ids, integers (N, 2, L), or (D, B, 2, L); see `FlaxStableDiffusionPipeline`.
            params: See `FlaxStableDiffusionPipeline`.
            prng_seed: See `FlaxStableDiffusionPipeline`.
            num_inference_steps: Denoising steps.
            guidance_scale: See `FlaxStableDiffusionPipeline`.
            height: Height of the pictures in pixels; None for the one that the UNet was trained at.
            width: Width, likewise.
            latents: Noise to start from, (N, C, h, w); None draws it.
            neg_prompt_ids: Token ids of prompts to guide away from; None for zeros.
            return_dict: Return a dataclass; False returns a tuple.
            output_type: "latent" for latents; None or "np" for pictures.
            jit: Divide the pictures over all devices; False uses one.

        Returns:
            The pictures, or latents (N, C, h, w).

        Raises:
            ConfigError: If inputs do not fit each other, the models or the devices.
            WeightsError: If the parameters are not those of the models.
        """
        if output_type not in (None, "np", "latent"):
            raise ConfigError(f"output_type is {output_type!r}: use 'latent', or 'np' for pictures and numpy_to_pil")
        layout = layout_of(prompt_ids, 3, jit)
        height, width = picture_size(self.unet, self.vae_scale_factor, height, width)
        arrays = {
            "prompt_ids": layout.flat(prompt_ids, "prompt_ids"),
            "guidance_scale": layout.number(guidance_scale, "guidance_scale"),
        }
        for name, given in (("negative_ids", neg_prompt_ids), ("latents", latents)):
            if given is not None:
                arrays[name] = layout.flat(given, name.replace("negative_ids", "neg_prompt_ids"))
        names = ("text_encoder", "text_encoder_2", "unet", "vae", "scheduler")
        settings = {"height": height, "width": width, "steps": num_inference_steps, "factor": self.vae_scale_factor}
        parts = {name: getattr(self, name) for name in names}
        images = run(parts, _draw, layout, params, prng_seed, arrays, decoded=output_type != "latent", **settings)
        made = layout.outputs(images)
        return FlaxStableDiffusionXLPipelineOutput(made) if return_dict else (made,)

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
        return_latents: bool = False,
    ) -> Array:
        """Return the pictures of one device; see `FlaxStableDiffusionPipeline._generate`.

        Args:
            prompt_ids: Token ids, integers (N, 2, L).
            params: Parameters by part, and the scheduler's state.
            prng_seed: Random key.
            num_inference_steps: Denoising steps.
            height: Height of the pictures in pixels.
            width: Width.
            guidance_scale: Scale of classifier-free guidance: a number, or one for each picture.
            latents: Noise to start from, (N, C, h, w); None draws it.
            neg_prompt_ids: Token ids of prompts to guide away from; None for zeros.
            return_latents: Return latents (N, C, h, w).
        """
        height, width = picture_size(self.unet, self.vae_scale_factor, height, width)
        arrays = {"prompt_ids": prompt_ids, "guidance_scale": of_each(guidance_scale, len(prompt_ids))}
        arrays |= {} if neg_prompt_ids is None else {"negative_ids": neg_prompt_ids}
        arrays |= {} if latents is None else {"latents": latents}
        settings = {"height": height, "width": width, "steps": num_inference_steps, "factor": self.vae_scale_factor}
        return _draw(self.components, params, prng_seed[None], arrays, decoded=not return_latents, **settings)
