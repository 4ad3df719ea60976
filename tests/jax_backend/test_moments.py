"""Moments that take less of a device: in 8 bits, or in the host's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run.test_resume import STEPS, assert_same, run
from tiny import RUN

from flax_diffusion.core.errors import CheckpointError
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.optimizers import eight_bit, offload
from flax_diffusion.jax_backend.program import Program
from flax_diffusion.jax_backend.sharding import make_mesh

WIDE = {"unet": RUN["unet"] | {"block_out_channels": [8, 64]}, "gradient_accumulation_steps": 1, "use_8bit_adam": True}


@pytest.mark.parametrize("shape", [(3, 3, 320, 8), (600, 8), (56, 5)])
def test_codes_are_within_a_sixteenth(shape):
    """Of numbers over four decades within each block; zeros stay zeros, and nothing else becomes one."""
    rng = np.random.default_rng(0)
    x = np.float32(10 ** rng.uniform(-4, 0, shape) * rng.choice([-1, 0, 1], shape))
    coded = eight_bit.quantize(eight_bit.split_into_blocks(jnp.asarray(x)))
    back = np.asarray(eight_bit.dequantize(coded)).reshape(shape)
    assert coded.codes.nbytes == x.size
    np.testing.assert_array_equal(np.sign(back), np.sign(x))
    large = np.abs(x) > 1e-4 * np.abs(x).max()
    np.testing.assert_allclose(back[large], x[large], rtol=1 / 16)


def test_updates_are_near_those_of_adam():
    """On gradients of very different sizes in one array, over 50 steps."""
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-4, 0, (128, 64))
    params = {"kernel": jnp.zeros((128, 64))}
    options = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    ours, theirs = eight_bit.scale_by_8bit_adam(**options), optax.scale_by_adam(**options)
    states = [ours.init(params), theirs.init(params)]
    for _ in range(50):
        grads = {"kernel": jnp.asarray(sizes * (1 + rng.standard_normal(sizes.shape)), jnp.float32)}
        (update, states[0]), (expected, states[1]) = (
            jax.jit(one.update)(grads, state) for one, state in zip((ours, theirs), states, strict=True)
        )
    difference = np.abs(update["kernel"] - expected["kernel"]).mean() / np.abs(expected["kernel"]).mean()
    assert difference < 0.1


@pytest.mark.acceptance
def test_a_run_resumes_bitwise(tmp_path):
    whole = run("flax_diffusion", tmp_path / "whole", **WIDE)
    assert np.dtype(np.uint8) in {array.dtype for array in whole[0].values()}
    run("flax_diffusion", tmp_path / "part", 3, **WIDE)
    again = {"resume_from_checkpoint": "latest"}
    assert_same(run("flax_diffusion", tmp_path / "part", **again, **WIDE), whole)
    with pytest.raises(CheckpointError, match=f"checkpoint-{STEPS} is of another model or optimizer"):
        run("flax_diffusion", tmp_path / "part", **again, **WIDE | {"use_8bit_adam": False})


@pytest.mark.acceptance
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": 1}, WIDE], ids=["float32", "skipping", "8-bit"])
def test_moments_on_the_host(tmp_path, options):
    """They are there, and nothing else is; the run is bitwise the one with moments on the device."""
    states = []
    for there in (False, True):
        more = {
            "offload_optimizer": there,
            "output_dir": str(tmp_path / str(there)),
            "report_to": "none",
            "draw_samples": False,
        }
        config = UnconditionalConfig(**RUN | options | more | {"use_ema": True})
        made = []

        def make(config, spec, made=made):
            made.append(JaxBackend(config, spec, jax.devices()[:1]))
            return made[-1]

        fit(task_of(config), make)
        states.append(made[-1].state)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(states[1].opt_state) if leaf.ndim}
    assert kinds == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves((states[1].params, states[1].ema))} == {"device"}
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, states))


LONG = pytest.mark.acceptance


@pytest.mark.parametrize(
    ("before", "after"), [(True, True), pytest.param(False, True, marks=LONG), pytest.param(True, False, marks=LONG)]
)
def test_moments_on_the_host_resume(tmp_path, monkeypatch, before, after):
    """Bit for bit, whichever side they were on when they were saved; they are then where the run wants them."""
    options = {"max_train_steps": 4, "gradient_accumulation_steps": 1, "checkpointing_steps": 4}
    restore, kinds = JaxBackend.restore, []

    def looked_at(self, folder):
        metadata = restore(self, folder)
        kinds.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(self.state.opt_state) if leaf.ndim})
        return metadata

    monkeypatch.setattr(JaxBackend, "restore", looked_at)
    whole = run("flax_diffusion", tmp_path / "whole", **options, offload_optimizer=after)
    run("flax_diffusion", tmp_path / "part", 2, **options, offload_optimizer=before)
    again = options | {"resume_from_checkpoint": "latest", "offload_optimizer": after}
    assert_same(run("flax_diffusion", tmp_path / "part", **again), whole)
    assert kinds == [{"pinned_host" if after else "device"}]


@pytest.mark.parametrize("adam", [optax.scale_by_adam, eight_bit.scale_by_8bit_adam], ids=["float32", "8-bit"])
def test_a_few_moments_at_a_time(monkeypatch, adam):
    """Updates are bitwise those of all at once, operation by operation; compiled, XLA rounds divisions in two ways."""
    monkeypatch.setattr(offload, "MAX_GROUP_SIZE", 5000)
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 4), "b": (64, 64), "c": (8,), "d": (128, 64), "e": (), "f": (64, 32)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    plain = adam(b1=0.9, b2=0.999, eps=1e-8)
    visiting = offload.from_host(plain)
    here, there = (one.init(params) for one in (plain, visiting))
    for _ in range(3):
        grads = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
        with jax.disable_jit():
            (expected, here), (found, there) = plain.update(grads, here), visiting.update(grads, there)
        jax.tree.map(np.testing.assert_array_equal, (found, there), (expected, here))
        compiled, other = (jax.jit(one.update)(grads, here)[0] for one in (visiting, plain))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), compiled, other)
    assert jax.tree.leaves(there.mu)[0].sharding.memory_kind == "pinned_host"


def test_where_a_state_lives():
    """Of a program that is only described: moments on the host, 8-bit codes in place of large ones."""
    config = UnconditionalConfig(**RUN | {"unet": WIDE["unet"]}, offload_optimizer=True, use_8bit_adam=True)
    source = task_of(config).open_source()
    state = Program(config, task_of(config).make_spec(source), make_mesh(1, 1, jax.devices()[:1])).state
    adam = state.opt_state[0]
    moments = jax.tree.leaves((adam.mu, adam.nu))
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
    assert adam.count.sharding.memory_kind == "device"
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in moments)
    assert held < 3.2 * sum(leaf.size for leaf in jax.tree.leaves(state.params))  # of 8 bytes a weight
