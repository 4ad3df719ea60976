"""The same run on one device and on eight, however the mesh is laid out."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from eight_devices import EIGHT, STEPS, losses, lowered
from jax.sharding import PartitionSpec as P
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.jax_backend.sharding import make_mesh, partition_of, state_shardings
from flax_diffusion.models import FlaxCLIPTextModule, FlaxUNet2DConditionModel
from tpu import hlo


def exchanged(backend):
    """Bytes a device and step, of what exchanges result in: weights and gradients, and no layer's images."""
    text = lowered(backend.config, backend.spec, backend.program).compile().as_text()
    return sum(operation.bytes_exchanged for operation in hlo.operations(text))


@pytest.fixture(scope="module")
def one_device():
    return losses(1)[0]


LONG = pytest.mark.acceptance


@pytest.mark.parametrize(("data", "fsdp"), [pytest.param(8, 1, marks=LONG), pytest.param(1, 8, marks=LONG), (2, 4)])
def test_eight_devices_equal_one(one_device, data, fsdp):
    eight, backend = losses(8, data_parallelism=data, fsdp_parallelism=fsdp)
    np.testing.assert_allclose(eight, one_device, rtol=1e-5)
    state = backend.state
    kernel = state.params["unet"]["conv_in"]["kernel"]
    moment = state.opt_state[0].mu["unet"]["conv_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size * fsdp == kernel.size
    for leaf in (moment, state.ema["ema"]["unet"]["conv_in"]["kernel"]):
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    assert exchanged(backend) < 2.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))


@pytest.mark.acceptance
@pytest.mark.parametrize(("precision", "unit"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_eight_devices_equal_one_in_16_bits(precision, unit):
    """Weights and moments stay float32, and the mean loss of 16 pictures is within a quarter of a rounding."""
    options = {"mixed_precision": precision, "unet": RUN["unet"] | ONE_BLOCK}
    one, alone = losses(1, **options)
    eight, backend = losses(8, **options, data_parallelism=2, fsdp_parallelism=4)
    assert one[-1] < 0.6 * one[0]
    np.testing.assert_allclose(eight, one, rtol=unit / 4)
    kernel = backend.state.params["unet"]["conv_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    kinds = {leaf.dtype for leaf in jax.tree.leaves((backend.state.params, backend.state.ema))}
    assert kinds == {np.dtype(np.float32)}
    for made in (alone, backend):
        assert (made.state.loss_scale is not None) == (precision == "fp16")
    if precision == "fp16":
        jax.tree.map(np.testing.assert_array_equal, backend.state.loss_scale, alone.state.loss_scale)
        assert int(backend.state.loss_scale.good_steps) == STEPS


@pytest.mark.acceptance
def test_accumulation_in_a_loop_equals_one_batch(one_device):
    accumulated, _ = losses(1, gradient_accumulation_steps=4)
    np.testing.assert_allclose(accumulated, one_device, rtol=1e-5)


def test_rules():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    over_all = ("data", "fsdp")
    assert partition_of("params/unet/conv_in/kernel", (3, 3, 1, 8), mesh) == P(None, None, None, "fsdp")
    assert partition_of("opt_state/0/mu/unet/conv_in/kernel", (3, 3, 1, 8), mesh) == P(None, None, None, over_all)
    assert partition_of("ema/unet/conv_out/kernel", (3, 3, 8, 1), mesh) == P(None, None, over_all, None)
    assert partition_of("opt_state/0/mu/unet/conv_out/kernel", (3, 3, 4, 1), mesh) == P(None, None, "fsdp", None)
    assert partition_of("params/unet/conv_out/kernel", (3, 3, 3, 1), mesh) == P()
    assert partition_of("params/unet/norm/scale", (8,), mesh) == P()
    assert partition_of("params/text_encoder/token_embedding/embedding", (64, 6), mesh) == P("fsdp", None)
    codes = "opt_state/0/mu/text_encoder/token_embedding/embedding/codes"
    assert partition_of(codes, (193, 32, 8, 768), mesh) == P(None, None, None, over_all)


@pytest.fixture(scope="module")
def published():
    """Shapes of the two models of Stable Diffusion 1.5 that can train."""
    configs = Path(__file__).parents[1] / "models/configs"
    kinds = {"unet": FlaxUNet2DConditionModel, "text_encoder": FlaxCLIPTextModule}
    return {
        name: kind.from_config(json.loads((configs / f"sd15_{name}.json").read_text())).params_shape()
        for name, kind in kinds.items()
    }


@pytest.mark.parametrize(("data", "fsdp"), [(1, 2), (4, 1), (1, 4), (2, 8), (1, 64), (4, 64)])
def test_every_large_array_is_divided(published, data, fsdp):
    """A device holds at most 1.05 times its share; past 64, channels no longer divide and some stays as it was."""
    mesh = jax.sharding.AbstractMesh((data, fsdp), ("data", "fsdp"))
    for kind, count in (("params", fsdp), ("ema", min(64, data * fsdp))):
        leaves = jax.tree.leaves({kind: published})
        shardings = jax.tree.leaves(state_shardings({kind: published}, mesh))
        held = sum(np.prod(one.shard_shape(leaf.shape)) for one, leaf in zip(shardings, leaves, strict=True))
        assert held <= 1.05 * sum(leaf.size for leaf in leaves) / count


@pytest.mark.acceptance
def test_several_averages_are_divided_over_all_devices():
    _, backend = losses(8, fsdp_parallelism=4, max_train_steps=2, ema_decays=[0.9], ema_sigma_rels=[0.1])
    assert [*backend.state.ema] == ["ema_0.9", "ema_sigma_rel_0.1"]
    for average in backend.state.ema.values():
        leaf = average["unet"]["conv_in"]["kernel"]
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size


def test_a_mesh_that_does_not_fit():
    with pytest.raises(
        ConfigError, match="fsdp 3 does not fit 8 devices: --fsdp_parallelism must be one of 1, 2, 4, 8"
    ):
        make_mesh(-1, 3, EIGHT)
    assert make_mesh(-1, 2, EIGHT).shape == {"data": 4, "fsdp": 2}
    assert UNET["block_out_channels"] == [8, 16]  # the sizes above rely on it
