"""fp16: overflowing gradients skip the step and halve the scale; 2,000 good steps double it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import OBJECTIVE, ONE_BLOCK, RUN, UNET

from flax_diffusion.core.errors import NonFiniteError
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend import train_step
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.optimizers.optimizer import LossScale
from flax_diffusion.train import train
from torch_backend import distribution
from torch_backend.distribution import TorchPlacement


def test_the_rule():
    scale = LossScale.create()
    assert float(scale.update(jnp.bool_(False)).scale) == 32768.0
    almost = LossScale(scale=jnp.float32(8.0), good_steps=jnp.int32(1999))
    grown = almost.update(jnp.bool_(True))
    assert (float(grown.scale), int(grown.good_steps)) == (16.0, 0)
    assert int(almost.update(jnp.bool_(False)).good_steps) == 0


def test_the_scale_has_a_floor():
    scale = LossScale.create()
    for _ in range(40):
        scale = scale.update(jnp.bool_(False))
    assert float(scale.scale) == 1.0


def test_the_scale_of_pytorch_has_the_same_floor():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    placement = TorchPlacement(optimizer, torch.amp.GradScaler("cpu"))
    for scale in (4.0, 1.0, 0.5, 0.0):
        placement.set_loss_scale(distribution.LossScale(scale, 3))
        placement.hold_loss_scale()
        assert placement.loss_scale() == (max(scale, 1.0), 3)


@pytest.mark.parametrize("skip", [0, 2])
def test_gradients_that_always_overflow_end_the_run(tmp_path, monkeypatch, skip):
    """After the scale has come down to 1; the steps before are the scale's to see to."""
    real = train_step.clip_by_global_norm

    def overflow(grads, most):
        clipped, norm = real(grads, most)
        return clipped, norm * jnp.inf

    monkeypatch.setattr(train_step, "clip_by_global_norm", overflow)
    options = RUN | {
        "mixed_precision": "fp16",
        "max_train_steps": 60,
        "skip_nonfinite": skip,
        "report_to": "none",
        "draw_samples": False,
    }
    options |= {"unet": UNET | ONE_BLOCK, "validation_epochs": None, "output_dir": str(tmp_path)}
    with pytest.raises(NonFiniteError, match=rf"step {17 + skip} is not finite \(.*grad_norm inf, loss_scale 1\)"):
        train("unconditional", **options)


def test_an_overflow_skips_the_step():
    config = UnconditionalConfig(**RUN | {"mixed_precision": "fp16", "use_ema": True})
    backend = JaxBackend(config, task_of(config).make_spec([]), jax.devices()[:1])
    backend.init_state()
    rng = np.random.default_rng(0)
    batch = backend.put({
        "pixel_values": rng.standard_normal((1, 2, 1, 8, 8), dtype=np.float32),
        "noise": rng.standard_normal((1, 2, 1, 8, 8), dtype=np.float32),
        **{name: values[None, [10, 500]] for name, values in OBJECTIVE.tables._asdict().items()},
    })  # fmt: skip
    huge = LossScale(scale=jax.device_put(jnp.float32(3e38), backend.state.step.sharding),
                     good_steps=backend.state.loss_scale.good_steps)  # fmt: skip
    backend.state = backend.state.replace(loss_scale=huge)
    before = jax.device_get((backend.state.params, backend.state.opt_state, backend.state.ema))
    metrics = backend.read(backend.train_step(batch, 1e-3, {"ema": 0.5}))
    after = jax.device_get((backend.state.params, backend.state.opt_state, backend.state.ema))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert float(backend.state.loss_scale.scale) == np.float32(3e38) / 2
    assert int(backend.state.step) == 1
