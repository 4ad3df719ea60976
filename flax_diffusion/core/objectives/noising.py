"""The noise of an example, and its strength by the objective."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flax_diffusion.core.objectives.objective import Objective
from flax_diffusion.core.randomness.streams import Stream


@dataclass(frozen=True, kw_only=True)
class NoiseSpec:
    """Timestep and noises to draw for each example.

    Attributes:
        shape: (C, h, w) of what is noised: the latents, or the pixels of a pixel-space model.
        objective: What draws the timestep; None where nothing is noised, as for an autoencoder.
        noise_offset: Strength of the offset that is added to each channel's noise.
        input_perturbation: γ of Ning et al. 2023, "Input Perturbation Reduces Exposure Bias".
        latent_noise: Whether to draw the noise that samples the autoencoder's posterior.
    """

    shape: tuple[int, int, int]
    objective: Objective | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    latent_noise: bool = False

    def draw(self, rng: Callable[[Stream], np.random.Generator]) -> dict[str, np.ndarray]:
        """Draw one example's timestep and noises.

        Args:
            rng: Returns the example's generator of a stream; it is `example_rng` with its other arguments bound.

        Returns:
            `loss_weights` float32 (); where something is noised, the other fields of what the objective draws and
            `noise` float32 (C, h, w); where asked for, `perturbation`, already multiplied by γ, and `latent_noise`,
            both float32 (C, h, w).

        Reference:
            HF's example scripts: `noise += offset * randn(C, 1, 1)`; the model is given
            `add_noise(x0, noise + perturbation, t)` and its target is made of the noise alone.
        """

        def normal(stream: Stream, shape: tuple[int, ...]) -> np.ndarray:
            return rng(stream).standard_normal(shape, dtype=np.float32)

        drawn = {"loss_weights": np.ones((), np.float32)}
        if self.objective is not None:
            fields = self.objective.draw(rng(Stream.TIMESTEP))._asdict()
            drawn |= {name: np.asarray(number) for name, number in fields.items()}
            drawn["noise"] = normal(Stream.NOISE, self.shape)
        if self.noise_offset:
            drawn["noise"] += np.float32(self.noise_offset) * normal(Stream.OFFSET, (self.shape[0], 1, 1))
        if self.input_perturbation:
            drawn["perturbation"] = normal(Stream.PERTURBATION, self.shape)
            drawn["perturbation"] *= np.float32(self.input_perturbation)
        if self.latent_noise:
            drawn["latent_noise"] = normal(Stream.LATENT, self.shape)
        return drawn
