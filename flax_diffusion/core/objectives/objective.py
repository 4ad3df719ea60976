"""What a denoiser learns: how an example's time is drawn, and how its input and its target are mixed.

With Gaussian noise every objective here is linear in the clean sample x and the noise ε. So an example carries four
numbers, and a train step knows no objective:

    input  = input_clean · x + input_noise · (ε + perturbation)
    target = target_clean · x + target_noise · ε
    loss   = loss_weights · mean (prediction − target)²
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Mixture(NamedTuple):
    """What an objective draws for one example; every field is a scalar array ().

    Attributes:
        timesteps: The time that the model is told: int32 of a discrete objective, float32 of a continuous one.
        input_clean: Of x in the model's input.
        input_noise: Of ε in the model's input.
        target_clean: Of x in what the model is to say.
        target_noise: Of ε in what the model is to say.
        loss_weights: Of the example's mean squared error, float32.
    """

    timesteps: np.ndarray
    input_clean: np.ndarray
    input_noise: np.ndarray
    target_clean: np.ndarray
    target_noise: np.ndarray
    loss_weights: np.ndarray


class Objective(Protocol):
    """Draws the mixtures of examples. Picklable, since loader processes draw too."""

    def draw(self, rng: np.random.Generator) -> Mixture:
        """Draw one example's mixture.

        Args:
            rng: gives the example's time, and nothing else is drawn from it.
        """
        ...
