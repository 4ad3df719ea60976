"""What devices exchange: sums of gradients, weights by layer, and masks that do not depend on them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import EIGHT, losses, lowered, made
from jax.sharding import PartitionSpec as P
from tiny import ONE_BLOCK, RUN, UNET, pictures, stable_diffusion
from tiny import losses as recorded

from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.dreambooth import DreamBoothConfig
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.exchange import Exchange
from flax_diffusion.jax_backend.program import SUM_DTYPES, Program
from flax_diffusion.jax_backend.sharding import make_mesh
from flax_diffusion.models.dropout import keep_mask


@pytest.mark.acceptance
def test_dropout_and_gathering_by_layers():
    """A run draws the same masks on any devices; layers that gather their weights compute the same."""
    options = {"unet": RUN["unet"] | ONE_BLOCK | {"dropout": 0.3}, "max_train_steps": 3}
    one, _ = losses(1, **options)
    for how in ({}, {"fsdp_gather": "block", "gradient_checkpointing": True}):
        np.testing.assert_allclose(losses(8, **options, **how, fsdp_parallelism=4)[0], one, rtol=1e-5)


def test_a_device_draws_the_masks_of_its_own_images():
    """The same masks as one device draws, and no array as large as those of all images."""
    mesh, shape = make_mesh(-1, 2, EIGHT), (16, 4, 3)
    key = jax.random.key(5)

    def masks(key):
        return keep_mask(key, 0.3, (shape[0] // 8, *shape[1:]))

    run = jax.shard_map(masks, mesh=mesh, in_specs=P(), out_specs=P(mesh.axis_names))
    whole = keep_mask(key, 0.3, shape)
    np.testing.assert_array_equal(jax.jit(run)(key), whole)
    assert len({*map(bytes, np.asarray(whole))}) == 16  # each image has its own
    compiled = jax.jit(run).lower(key).compile().as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"(?:pred|[suf]\d+)\[([\d,]+)\]", compiled)]
    assert max(sizes) == math.prod(shape) // 8


@pytest.mark.acceptance
def test_lora_with_layers_that_gather(tmp_path):
    """Adapters are small: they are gathered first, and only the frozen weights by the layers."""
    base = stable_diffusion(tmp_path / "base")
    values = {
        "pretrained_model_name_or_path": str(base), "instance_data_dir": str(pictures(tmp_path / "data", 8)),
        "instance_prompt": "a sks dog", "resolution": 16, "lora_rank": 2, "lora_dropout": 0.3, "max_train_steps": 3,
        "train_text_encoder": True, "global_batch_size": 8, "lr_warmup_steps": 0, "learning_rate": 1e-2,
        "mixed_precision": "bf16", "validation_epochs": None,
    }  # fmt: skip
    ends = []
    for devices, how in ((1, {}), (8, {"fsdp_parallelism": 4, "fsdp_gather": "block"})):
        config = DreamBoothConfig(**values, **how, output_dir=str(tmp_path / f"{devices}"))
        fit(task_of(config), lambda config, spec, devices=devices: JaxBackend(config, spec, EIGHT[:devices]))
        ends.append(recorded(tmp_path / f"{devices}"))
    np.testing.assert_allclose(ends[1], ends[0], rtol=2e-3)


@pytest.mark.parametrize(("asked", "kind"), [("fp32", "f32"), ("bf16", "bf16")])
def test_gradients_are_summed_in_the_precision_asked_for(asked, kind):
    """Of eight devices, one has a gradient of 1 and seven of 2⁻⁹, which a sum in bfloat16 would lose."""
    mesh = make_mesh(2, 4, EIGHT)
    exchange = Exchange(mesh, SUM_DTYPES[asked])
    grads = np.full((8, 8, 4), 2**-9, jnp.bfloat16)
    grads[3] = 1
    for spec in (P(), P("fsdp"), P(("data", "fsdp")), P(None, "fsdp")):
        add = exchange.shard_map(lambda part, s=spec: exchange.sum(part[0], s, jnp.float32), P(mesh.axis_names), spec)
        total = np.asarray(jax.jit(add)(grads))
        assert total.shape == (8, 4)
        right = 1 + 7 * 2**-9
        assert (total == right).all() if asked == "fp32" else (abs(total - right) > 2**-10).all()
    config, spec = made(mixed_precision="bf16", reduce_dtype=asked, fsdp_parallelism=4, unet=UNET | ONE_BLOCK)
    text = lowered(config, spec, Program(config, spec, make_mesh(2, 4, EIGHT))).as_text()
    sums = re.findall(r"stablehlo\.(?:reduce_scatter|all_reduce).*?\) : \(tensor<([^>]*)>", text, re.DOTALL)
    kinds = [shape.split("x")[-1] for shape in sums]
    assert kinds.count("f32") == (1 if asked == "bf16" else len(kinds)), "all but the loss"
    assert set(kinds) == {"f32", kind}
