"""Consistency training on straight paths: an objective of one's own, whose loss is not linear in x and ε.

The model's F says where a path ends: f(x_t, t) = x_t − t·F(x_t, t) is the clean sample, from any time t of the path
x_t = (1 − t)·x + t·ε. Along a path, whose velocity is v = ε − x, f must not change:

    0 = df/dt = v − F − t·dF/dt,        dF/dt = ∂F/∂x·v + ∂F/∂t

So F is trained towards v − t·dF/dt, whose last term is one `jax.jvp` that no gradient goes through. It is MeanFlow's
loss for intervals that end at 0. There the model needs to be told one time, as the models here are.

To use it, copy this file, and train by `--objective consistency:Consistency`.

Reference: Song et al., https://arxiv.org/abs/2303.01469; Lu and Song, https://arxiv.org/abs/2410.11081, for continuous
time; Geng et al., https://arxiv.org/abs/2505.13447, for the mean velocity and the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_diffusion.core.objectives.objective import Objective

Model = Callable[[jax.Array, jax.Array], jax.Array]

TOLD = 10.0
"""Factor on t in the time that the model is told. With 1000, dF/dt is too large to train by."""
MEAN, DEVIATION = -0.4, 1.0
"""Of log(t / (1 − t)), which is normal."""
SMALLEST = 1e-3
"""Added to an example's error, by which its gradient is divided."""


class Drawn(NamedTuple):
    """What is drawn for one example; every field is a scalar array ()."""

    time: np.ndarray
    loss_weights: np.ndarray


class Consistency(Objective):
    """Learns where paths end; draws in one step, or in a few."""

    name, schedulers = "consistency", ("ConsistencyScheduler",)

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one example's time."""
        time = 1 / (1 + np.exp(-(MEAN + DEVIATION * rng.standard_normal())))
        return Drawn(np.asarray(time, self.dtype), np.asarray(1, self.dtype))

    def loss(self, model: Model, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        """Return the losses, (B,)."""
        t, velocity = batch["time"], batch["noise"] - batch["clean"]
        wide = t[:, None, None, None]
        x = batch["clean"] + wide * velocity
        at = (x, t), (velocity, jnp.ones_like(t))
        predicted, change = jax.jvp(lambda x, t: model(x, TOLD * t), *at)
        target = jax.lax.stop_gradient(velocity - wide * change)
        error = jnp.square(predicted - target).mean((1, 2, 3))
        return error / jax.lax.stop_gradient(error + SMALLEST)

    def sample(self, model: Model, noise: jax.Array) -> jax.Array:
        """Return samples (B, C, h, w): each step goes to the end of a path, and all but the last part-way back."""
        steps, x = len(noise), noise[0]
        for step in range(steps):
            t, after = 1 - step / steps, 1 - (step + 1) / steps
            x = x - t * model(x, jnp.full(len(x), TOLD * t))
            if step + 1 < steps:
                x = (1 - after) * x + after * noise[step + 1]
        return x
