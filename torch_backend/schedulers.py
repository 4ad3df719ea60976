"""Samplers that Diffusers has no class for; the twins of `flax_diffusion.schedulers`, which give the mathematics."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import EDMEulerScheduler  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor


class EDMHeunScheduler(EDMEulerScheduler):
    """Heun's method on EDM's denoiser; the twin of `flax_diffusion.schedulers.heun.FlaxEDMHeunScheduler`."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # pyright: ignore
        """Set the σ and timesteps of every evaluation: 2·steps − 1 of them."""
        super().set_timesteps(num_inference_steps, device)
        sigmas, timesteps = self.sigmas, self.timesteps
        self.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        self.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
        self._evaluation = 0
        self._begun: tuple[Tensor, Tensor] | None = None

    def _sigma(self) -> Tensor:
        return self.sigmas[self._evaluation]

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:  # pyright: ignore
        """Return c_in · sample."""
        del timestep
        return self.precondition_inputs(sample, self._sigma())

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:  # pyright: ignore
        """Return the sample after an evaluation.

        Args:
            model_output: F, (B, C, h, w).
            timestep: Not read: evaluations are counted.
            sample: x0 + σ·ε, (B, C, h, w).
        """
        del timestep
        sigma = self._sigma()
        slope = (sample - self.precondition_outputs(sample, model_output, sigma)) / sigma
        if self._begun is None:
            self._begun = (sample, slope)
            previous = sample + (self.sigmas[self._evaluation + 1] - sigma) * slope
        else:
            (begin, first), self._begun = self._begun, None
            previous = begin + (sigma - self.sigmas[self._evaluation - 1]) * (0.5 * (first + slope))
        self._evaluation += 1
        return SchedulerOutput(prev_sample=previous)


class FlowMatchSDEScheduler(SchedulerMixin, ConfigMixin):
    """Euler and Maruyama's method; the twin of `flax_diffusion.schedulers.flow_match_sde.FlaxFlowMatchSDEScheduler`.

    Args:
        num_train_timesteps: See there.
        shift: See there.
        diffusion_norm: See there; `diffusion_form` is "sigma".
        last_step_size: See there.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        diffusion_norm: float = 1.0,
        last_step_size: float = 0.04,
    ):
        self.total, self.shift, self.norm, self.last = num_train_timesteps, shift, diffusion_norm, last_step_size

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the σ and timesteps of a trajectory."""
        plain = np.linspace(1, self.last, num_inference_steps)
        sigmas = (self.shift * plain / (1 + (self.shift - 1) * plain)).astype(np.float32)
        self.timesteps = torch.from_numpy(sigmas * np.float32(self.total)).to(device)
        self.sigmas = torch.from_numpy(np.append(sigmas, np.float32(0))).to(device)
        self._step = 0

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> SchedulerOutput:
        """Return the sample at the next σ.

        Args:
            model_output: Velocity, (B, C, h, w).
            timestep: Not read: steps are counted.
            sample: (1 − σ)·x0 + σ·ε, (B, C, h, w).
        """
        del timestep
        sigma, after = self.sigmas[self._step], self.sigmas[self._step + 1]
        step, width = sigma - after, self.norm * sigma
        score = -(sample + (1 - sigma) * model_output) / sigma
        previous = sample + (width * score - model_output) * step
        if after > 0:
            previous = previous + torch.sqrt(2 * width * step) * torch.randn(sample.shape, dtype=sample.dtype)
        self._step += 1
        return SchedulerOutput(prev_sample=previous)
