"""fp16: overflowing gradients skip the step and halve the scale; 2,000 good steps double it."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import RUN

from flax_diffusion.backend import JaxBackend
from flax_diffusion.core import task_pipelines
from flax_diffusion.core.tasks import UnconditionalConfig
from flax_diffusion.optimizer import LossScale


def test_the_rule():
    scale = LossScale.create()
    assert float(scale.update(jnp.bool_(False)).scale) == 32768.0
    almost = LossScale(scale=jnp.float32(8.0), good_steps=jnp.int32(1999))
    grown = almost.update(jnp.bool_(True))
    assert (float(grown.scale), int(grown.good_steps)) == (16.0, 0)
    assert int(almost.update(jnp.bool_(False)).good_steps) == 0


def test_an_overflow_skips_the_step():
    config = UnconditionalConfig(**RUN | {"mixed_precision": "fp16", "use_ema": True})
    backend = JaxBackend(config, task_pipelines.unconditional(config), jax.devices()[:1])
    backend.init_state()
    rng = np.random.default_rng(0)
    batch = backend.put({
        "pixel_values": rng.standard_normal((1, 2, 1, 8, 8), dtype=np.float32),
        "noise": rng.standard_normal((1, 2, 1, 8, 8), dtype=np.float32),
        "timesteps": np.array([[10, 500]], np.int32),
        "loss_weights": np.ones((1, 2), np.float32),
    })  # fmt: skip
    huge = LossScale(scale=jax.device_put(jnp.float32(3e38), backend.state.step.sharding),
                     good_steps=backend.state.loss_scale.good_steps)  # fmt: skip
    backend.state = backend.state.replace(loss_scale=huge)
    before = jax.device_get((backend.state.params, backend.state.opt_state, backend.state.ema))
    metrics = backend.read(backend.train_step(batch, 1e-3, 0.5))
    after = jax.device_get((backend.state.params, backend.state.opt_state, backend.state.ema))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert float(backend.state.loss_scale.scale) == np.float32(3e38) / 2
    assert int(backend.state.step) == 1
