"""What an example carries of noise: its timestep, its noise, and how strong it is."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flax_diffusion.core.randomness.streams import Stream


@dataclass(frozen=True, kw_only=True)
class NoiseSpec:
    """What is drawn for one example's place in the diffusion process."""

    shape: tuple[int, int, int]  # (C, h, w) of what is noised: the latents, or the pixels of a pixel-space model
    num_train_timesteps: int | None = 1000  # None: nothing is noised, as for an autoencoder
    noise_offset: float = 0.0
    input_perturbation: float = 0.0  # γ of Ning et al. 2023, "Input Perturbation Reduces Exposure Bias"
    latent_noise: bool = False  # also draw what samples the autoencoder's posterior

    def draw(self, rng: Callable[[Stream], np.random.Generator]) -> dict[str, np.ndarray]:
        """Draw one example's timestep and noises.

        Args:
            rng: gives the example's generator of a stream: `example_rng` with all else settled.

        Returns:
            `timesteps` int32 () and `noise` float32 (C, h, w) where something is noised and, where asked for,
            `perturbation`, already times γ, and `latent_noise`, both float32 (C, h, w).

        Reference: HF's example scripts: `noise += offset * randn(C, 1, 1)`; the model is given
        `add_noise(x0, noise + perturbation, t)` and its target is made of the noise alone.
        """

        def normal(stream: Stream, shape: tuple[int, ...]) -> np.ndarray:
            return rng(stream).standard_normal(shape, dtype=np.float32)

        drawn = {}
        if self.num_train_timesteps is not None:
            timestep = rng(Stream.TIMESTEP).integers(self.num_train_timesteps)
            drawn |= {"timesteps": np.asarray(timestep, np.int32), "noise": normal(Stream.NOISE, self.shape)}
        if self.noise_offset:
            drawn["noise"] += np.float32(self.noise_offset) * normal(Stream.OFFSET, (self.shape[0], 1, 1))
        if self.input_perturbation:
            drawn["perturbation"] = normal(Stream.PERTURBATION, self.shape)
            drawn["perturbation"] *= np.float32(self.input_perturbation)
        if self.latent_noise:
            drawn["latent_noise"] = normal(Stream.LATENT, self.shape)
        return drawn
