"""Sampling of images from noise: one compiled denoising step, which a plain loop runs.

All noise is drawn on the host from a generator keyed by (seed, image, step), so a picture does not depend on batch
size, devices or backend.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_diffusion.core.objectives.samplers import takes_variance
from flax_diffusion.core.randomness.streams import sampling_noise
from flax_diffusion.core.spec.prompts import Begin, guidance_scales, is_guided, told
from flax_diffusion.jax_backend.modules import Modules
from flax_diffusion.jax_backend.optimizers.optimizer import Params
from flax_diffusion.jax_backend.processes import to_host
from flax_diffusion.jax_backend.sharding import batch_sharding, put, put_replicated
from flax_diffusion.schedulers import FlaxDDPMScheduler, FlaxFlowMatchSDEScheduler

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Num, UInt8


class Sampler:
    """Sampler of images from a pipeline's modules, with any of the schedulers.

    Args:
        modules: The pipeline's modules.
        scheduler: A scheduler of `flax_diffusion.schedulers`; None for an objective that draws by itself.
        mesh: Devices over which a batch is split.
    """

    def __init__(self, modules: Modules, scheduler: Any, mesh: Mesh):
        self.modules, self.scheduler, self.mesh = modules, scheduler, mesh
        self._whole = jax.jit(self._by_objective, static_argnames="guided")
        algorithm = "" if scheduler is None else str(scheduler.config.get("algorithm_type", ""))
        self.stochastic = isinstance(scheduler, FlaxDDPMScheduler | FlaxFlowMatchSDEScheduler) or algorithm.startswith(
            "sde"
        )
        self.takes_variance = scheduler is not None and takes_variance(scheduler.torch_class_name, scheduler.config)
        self._denoise = jax.jit(self._denoise_step, static_argnames="guided", donate_argnames=("state", "sample"))
        self._condition = jax.jit(self._told, static_argnames="zeroed")
        self._finish = jax.jit(functools.partial(to_uint8, modules))
        self._begin = jax.jit(self._noised)

    def __call__(self, params: Params, **options: Any) -> np.ndarray:
        """Draw all pictures.

        Args:
            params: Weights of all components.
            options: The other arguments of `batches`.

        Returns:
            Pictures, uint8 (images, H, W, C), prompt by prompt.

        Raises:
            ConfigError: As in `batches`.
        """
        return np.concatenate([*self.batches(params, **options)])

    def batches(
        self,
        params: Params,
        *,
        prompts: list[str],
        num_images: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        negative_prompt: str = "",
        batch_size: int = 64,
        extra: Mapping[str, np.ndarray] | None = None,
        guidance_interval: Sequence[float] = (),
        size: tuple[int, int] | None = None,
        begin: Begin | None = None,
    ) -> Iterator[np.ndarray]:
        """Draw `num_images` for each prompt, or in all where the pipeline takes no prompts.

        Args:
            params: Weights of all components.
            prompts: Texts; empty for an unconditional pipeline.
            num_images: Images per prompt.
            num_inference_steps: Denoising steps.
            guidance_scale: Scale w of classifier-free guidance; 1 or less turns it off.
            seed: Seed of all noise.
            negative_prompt: Text to guide away from.
            batch_size: Images drawn at a time; it changes speed and memory, not the pictures.
            extra: What the denoiser is told beside the prompts, by its name in a batch: arrays (prompts, …). None for
                nothing.
            guidance_interval: Noise levels between which samples are guided; see `guidance_scales`.
            size: Height and width of the pictures, in pixels; None for those of the pipeline.
            begin: What they are drawn over; None for noise.

        Yields:
            Batches of pictures, uint8 (images, H, W, C), prompt by prompt.

        Raises:
            ConfigError: If prompts are missing, or given to a pipeline that takes none.

        Reference:
            Ho and Salimans, https://arxiv.org/abs/2207.12598, with Diffusers' w: ε_∅ + w·(ε_c − ε_∅).
        """
        spec = self.modules.spec if size is None else replace(self.modules.spec, size=size)
        what = told(spec, prompts, negative_prompt, extra)
        guided = is_guided(self.modules.spec, prompts, guidance_scale)
        count = num_images * max(1, len(prompts))
        devices = self.mesh.size
        batch_size = -(-min(batch_size, count) // devices) * devices
        for first in range(0, count, batch_size):
            # The last batch is filled up, so that every batch has the same compiled shape.
            indices = np.arange(first, first + batch_size)
            condition = None
            if what.prompts:
                places = np.minimum(indices // num_images, len(prompts) - 1)
                batch = {name: array[places] for name, array in what.prompts.items()}
                if guided:
                    batch = {name: _doubled(rows, what.away.get(name)) for name, rows in batch.items()}
                placed = {name: self._put(rows) for name, rows in batch.items()}
                condition = self._condition(params, placed, zeroed=what.zeroed if guided else ())
            options = (num_inference_steps, guidance_scale if guided else None, guidance_interval, seed)
            own = None if begin is None else begin.at(indices // num_images)
            images = self._draw(params, condition, indices, spec.sample_shape, *options, own)
            yield to_host(images)[: count - first]

    def _told(self, params: Params, batch: Mapping[str, jax.Array], *, zeroed: tuple[str, ...]) -> Any:
        """Return what the denoiser is told; in the first half of the rows, some arrays are zero."""
        condition = self.modules.condition(params, batch)
        for name in zeroed:
            condition[name] = condition[name].at[: len(condition[name]) // 2].set(0)
        return condition

    def _put(self, array: np.ndarray) -> jax.Array:
        return put(array, batch_sharding(self.mesh, leading=0))

    def _draw(
        self,
        params: Params,
        condition: Any,
        indices: np.ndarray,
        shape: tuple[int, ...],
        num_inference_steps: int,
        guidance_scale: float | None,
        guidance_interval: Sequence[float],
        seed: int,
        begin: Begin | None,
    ) -> jax.Array:
        if self.modules.objective is not None:
            drawn = np.stack([sampling_noise(seed, indices, step, shape) for step in range(num_inference_steps)])
            noise = put(drawn.astype(np.float32), batch_sharding(self.mesh))
            scale = put_replicated(np.float32(guidance_scale or 1), self.mesh)
            return self._finish(params, self._whole(params, noise, condition, scale, guided=guidance_scale is not None))
        state = self.scheduler.create_state()
        state = self.scheduler.set_timesteps(state, num_inference_steps, shape=(len(indices), *shape))
        timesteps = np.asarray(state.timesteps)
        state = put_replicated(jax.device_get(state), self.mesh)
        guided = guidance_scale is not None
        scales = guidance_scales(self.modules.spec, timesteps, guidance_scale or 1, guidance_interval)
        weights = {scale: put_replicated(scale, self.mesh) for scale in np.unique(scales)}
        noise = sampling_noise(seed, indices, 0, shape)
        first = 0 if begin is None else begin.first_step
        if begin is None:
            sample = self._put((noise * np.asarray(state.init_noise_sigma)).astype(np.float32))
        else:
            begun = put_replicated(timesteps[first], self.mesh)
            sample = self._begin(params, state, self._put(begin.pixels), self._put(noise), begun)
        for number, (timestep, scale) in enumerate(zip(timesteps[first:], scales[first:], strict=True), first + 1):
            step = put_replicated(timestep, self.mesh)
            noise = sampling_noise(seed, indices, number, shape) if self.stochastic else None
            placed = None if noise is None else self._put(noise)
            state, sample = self._denoise(params, state, sample, step, condition, placed, weights[scale], guided=guided)
        return self._finish(params, sample)

    def _by_objective(
        self,
        params: Params,
        noise: Float[Array, "N B C h w"],
        condition: Any,
        guidance_scale: Float[Array, ""],
        *,
        guided: bool,
    ) -> Float[Array, "B C h w"]:
        """Return the samples that the objective itself draws, (B, C, h, w)."""
        objective = self.modules.objective
        assert objective is not None
        assert objective.sample is not None

        def model(x: Float[Array, "B C h w"], t: Float[Array, " B"]) -> Float[Array, "B C h w"]:
            return self._guided(params, x, t, condition, guidance_scale if guided else None)

        return objective.sample(model, noise)

    def _guided(
        self,
        params: Params,
        x: Float[Array, "B C h w"],
        timesteps: Num[Array, " B"],
        condition: Any,
        guidance_scale: Float[Array, ""] | None,
    ) -> Float[Array, "B c h w"]:
        """Return the prediction, guided unless the scale is None; the condition then has two halves.

        Where the scheduler takes a variance, it stands behind the prediction, (B, 2C, h, w), and is not guided.
        """
        if guidance_scale is not None:
            x, timesteps = jnp.concatenate([x, x]), jnp.concatenate([timesteps, timesteps])
        call = self.modules.output if self.takes_variance else self.modules.predict
        output = call(params, x, timesteps, condition).astype(x.dtype)
        if guidance_scale is None:
            return output
        without, with_prompt = jnp.split(output, 2)
        predicted, variance = with_prompt[:, : x.shape[1]], with_prompt[:, x.shape[1] :]
        without = without[:, : x.shape[1]]
        return jnp.concatenate([without + guidance_scale * (predicted - without), variance], axis=1)

    def _noised(
        self,
        params: Params,
        state: Any,
        pixels: Float[Array, "B c H W"],
        noise: Float[Array, "B C h w"],
        timestep: Num[Array, ""],
    ) -> Float[Array, "B C h w"]:
        """Return pictures at a timestep: their latents, which are the means of the posteriors, with noise."""
        latents = self.modules.encode_images(params, pixels, jnp.zeros_like(noise)).astype(noise.dtype)
        return self.scheduler.add_noise(state, latents, noise, jnp.broadcast_to(timestep, (len(noise),)))

    def _denoise_step(
        self,
        params: Params,
        state: Any,
        sample: Float[Array, "B C h w"],
        timestep: Num[Array, ""],
        condition: Any,
        noise: Float[Array, "B C h w"] | None,
        guidance_scale: Float[Array, ""],
        *,
        guided: bool,
    ) -> tuple[Any, Float[Array, "B C h w"]]:
        model_input = self.scheduler.scale_model_input(state, sample, timestep)
        steps = jnp.broadcast_to(timestep, (len(model_input),))
        predicted = self._guided(params, model_input, steps, condition, guidance_scale if guided else None)
        options = {} if noise is None else {"variance_noise": noise}
        output = self.scheduler.step(state, predicted, timestep, sample, **options)
        return output.state, output.prev_sample


def _doubled(rows: np.ndarray, away: np.ndarray | None) -> np.ndarray:
    """Put before some rows as many of what to guide away from; None for the same rows again."""
    return np.concatenate([rows if away is None else np.broadcast_to(away, rows.shape), rows])


def to_uint8(modules: Modules, params: Params, latents: Float[Array, "B C h w"]) -> UInt8[Array, "B H W C"]:
    """Decode denoised samples to pictures, rounded as Diffusers does.

    Args:
        modules: The pipeline's modules.
        params: Weights of all components.
        latents: Denoised samples, (B, C, h, w).

    Returns:
        Pictures, uint8 (B, H, W, C).
    """
    images = modules.decode_latents(params, latents).astype(jnp.float32)
    images = jnp.clip(images / 2 + 0.5, 0, 1)
    return jnp.round(images * 255).astype(jnp.uint8).transpose(0, 2, 3, 1)
