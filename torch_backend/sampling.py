"""Sampling of images from noise with Diffusers' schedulers.

All noise is drawn on the host from a generator keyed by (seed, image, step).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives.noise_schedule import timesteps_with_signal
from flax_diffusion.core.objectives.objective import objective_of
from flax_diffusion.core.objectives.samplers import DRAWING, OF_BETAS, OWN, class_name, in_place, takes_variance
from flax_diffusion.core.randomness.streams import sampling_noise
from flax_diffusion.core.spec.prompts import Begin, guidance_scales, is_guided, told
from torch_backend import schedulers
from torch_backend.modules import Modules

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

_NAME_OF_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")


def scheduler_from_config(config: dict[str, Any], kind: str | None = None) -> Any:
    """Make Diffusers' scheduler of a config, or another sampler with the same noise schedule.

    Args:
        config: Config of a Diffusers scheduler.
        kind: Key of `SAMPLERS`; None for the class that the config names.

    Raises:
        ConfigError: For a class that does not draw images here, or values that it does not accept.
    """
    own = objective_of(config)
    if own.loss is not None:
        raise ConfigError(
            f"--objective {own.name}: its loss and its samples are written in JAX: use python -m flax_diffusion.train, "
            "and .generate"
        )
    name, values = in_place(config, kind) if kind else (class_name(config), config)
    if name == OF_BETAS["dpm++"]:  # Diffusers' class takes the first three channels, however many there are
        values = {key: value for key, value in values.items() if key != "variance_type"}
    if name not in DRAWING:
        raise ConfigError(f"scheduler {name} does not draw images here; use one of {', '.join(DRAWING)}")
    made_by = getattr(schedulers if name in OWN else diffusers, name)
    try:
        made = made_by.from_config(values)
    except (ValueError, NotImplementedError) as error:
        reason = _NAME_OF_CLASS.sub(r"\1", str(error)).rstrip(".")
        fix = "choose another --scheduler" if kind else "correct its scheduler_config.json"
        raise ConfigError(f"scheduler {name} does not take this config: {reason}; {fix}") from error
    if name == OF_BETAS["dpm++"] and not made.config["use_flow_sigmas"]:
        # Diffusers' class does not check this, and goes through negative timesteps.
        timesteps_with_signal(made.alphas_cumprod.numpy(), made.config["lambda_min_clipped"])
    return made


class HostNoise(TorchFunctionMode):
    """Mode in which `torch.randn` returns given noise, so that a scheduler's random numbers are those of the JAX side.

    Args:
        draw: Returns the noise.
    """

    def __init__(self, draw: Callable[[], Tensor]):
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return self.draw()
        return func(*args, **(kwargs or {}))


class Sampler:
    """Sampler of images from a pipeline's modules; the twin of `flax_diffusion.jax_backend.sampling.Sampler`.

    Args:
        modules: The pipeline's modules.
        scheduler: A scheduler of Diffusers.
        device: Device of the modules.
    """

    def __init__(self, modules: Modules, scheduler: Any, device: torch.device):
        self.modules, self.scheduler, self.device = modules, scheduler, device
        self.takes_variance = takes_variance(type(scheduler).__name__, scheduler.config)

    def __call__(self, **options: Any) -> np.ndarray:
        """Draw all pictures, uint8 (images, H, W, C), prompt by prompt, with the arguments and errors of `batches`."""
        return np.concatenate([*self.batches(**options)])

    @torch.no_grad()
    def batches(
        self,
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

        Arguments and errors are those of the JAX side.

        Yields:
            Batches of pictures, uint8 (images, H, W, C), prompt by prompt.
        """
        spec = self.modules.spec if size is None else replace(self.modules.spec, size=size)
        what = told(spec, prompts, negative_prompt, extra)
        guided = is_guided(self.modules.spec, prompts, guidance_scale)
        count = num_images * max(1, len(prompts))
        rows_of = {name: torch.from_numpy(array) for name, array in what.prompts.items()}
        away = {name: torch.from_numpy(array) for name, array in what.away.items()}
        for first in range(0, count, batch_size):
            indices = np.arange(first, min(first + batch_size, count))
            condition = None
            if rows_of:
                batch = {name: array[indices // num_images] for name, array in rows_of.items()}
                if guided:
                    before = batch | {name: rows.expand_as(batch[name]) for name, rows in away.items()}
                    batch = {name: torch.cat([before[name], rows]) for name, rows in batch.items()}
                condition = self.modules.condition({name: rows.to(self.device) for name, rows in batch.items()})
                for name in what.zeroed if guided else ():
                    condition[name][: len(indices)] = 0
            options = (num_inference_steps, guidance_scale if guided else None, guidance_interval, seed)
            own = None if begin is None else begin.at(indices // num_images)
            yield self._draw(condition, indices, spec.sample_shape, *options, own)

    def _draw(
        self,
        condition: Any,
        indices: np.ndarray,
        shape: tuple[int, ...],
        steps: int,
        guidance_scale: float | None,
        guidance_interval: Sequence[float],
        seed: int,
        begin: Begin | None,
    ) -> np.ndarray:
        scheduler = self.scheduler
        scheduler.set_timesteps(steps, device=self.device)
        scales = hasattr(scheduler, "scale_model_input")
        timesteps = scheduler.timesteps.cpu().numpy()
        weights = guidance_scales(self.modules.spec, timesteps, guidance_scale or 1, guidance_interval)
        drawn = 0

        def noise() -> Tensor:
            return torch.from_numpy(sampling_noise(seed, indices, drawn, shape)).to(self.device)

        if begin is None:
            sample = noise() * getattr(scheduler, "init_noise_sigma", 1.0)  # the class of flow matching has none
        else:
            sample = self._noised(torch.from_numpy(begin.pixels).to(self.device), noise(), begin.first_step)
            drawn = begin.first_step
        for timestep, weight in zip(scheduler.timesteps[drawn:], weights[drawn:].tolist(), strict=True):
            drawn += 1
            model_input = scheduler.scale_model_input(sample, timestep) if scales else sample
            model_input = model_input if guidance_scale is None else torch.cat([model_input, model_input])
            call = self.modules.output if self.takes_variance else self.modules.predict
            output = call(model_input, timestep.expand(len(model_input)), condition).to(sample.dtype)
            if guidance_scale is not None:
                channels = sample.shape[1]  # what is behind them is a variance, which is not guided
                without, with_prompt = output.chunk(2)
                predicted, without = with_prompt[:, :channels], without[:, :channels]
                guided = without + weight * (predicted - without)
                output = torch.cat([guided, with_prompt[:, channels:]], dim=1)
            with HostNoise(noise):
                sample = scheduler.step(output, timestep, sample).prev_sample
        return to_uint8(self.modules, sample)

    def _noised(
        self, pixels: Float[Tensor, "B c H W"], noise: Float[Tensor, "B C h w"], first: int
    ) -> Float[Tensor, "B C h w"]:
        """Return pictures at the first timestep: their latents, which are the means of the posteriors, with noise."""
        latents = self.modules.encode_images(pixels, torch.zeros_like(noise)).to(noise.dtype)
        timesteps = self.scheduler.timesteps[first].expand(len(latents))
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(latents, timesteps, noise)
        return self.scheduler.add_noise(latents, noise, timesteps)


def to_uint8(modules: Modules, latents: Float[Tensor, "B C h w"]) -> UInt8[np.ndarray, "B H W C"]:
    """Decode denoised samples (B, C, h, w) to pictures, uint8 (B, H, W, C), rounded as Diffusers does."""
    images = (modules.decode_latents(latents).float() / 2 + 0.5).clamp(0, 1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
