"""What only a GPU runs, against float32 on the CPU: `JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu`.

The CPU's numbers are the JAX backend's for both: PyTorch draws the same weights, and `tests/torch_backend` holds the
two to each other there. A loss is a mean over many pixels, and so within one rounding of the format that products are
computed in; the errors of the weights come in with the steps, and at this rate stay below that: on the CPU the eight
losses in bf16 are within a fifth of it, those in fp16 within a third.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import RUN

from flax_diffusion.core.run import assembly
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.sharding import make_mesh
from flax_diffusion.models.attention import attention
from torch_backend.backend import TorchBackend

pytestmark = pytest.mark.gpu

CPU = jax.devices("cpu")[:1]  # other tests, and the fixtures, see the first device of all
GPU = [device for device in jax.devices() if device.platform == "gpu"][:1]
STEPS, RATE = 8, 1e-4
EXACT, TF32, FP16, BF16 = 1e-4, 2**-11, 2**-11, 2**-8
"""Of losses: convolutions of other algorithms, and one rounding of each format."""
OPTIONS = RUN | {
    # Attention has 64 tokens, as cuDNN's kernel wants; the largest weights are long enough for 8-bit moments.
    "unet": RUN["unet"] | {"block_out_channels": [8, 64], "attention_head_dim": 8},
    "resolution": 16, "max_train_steps": STEPS, "lr_warmup_steps": 0, "report_to": "none", "output_dir": "unused",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _a_gpu():
    assert GPU, "JAX sees no GPU: install jax[cuda13] and set JAX_PLATFORMS=cuda,cpu"
    assert torch.cuda.is_available(), "PyTorch sees no GPU: install its CUDA build"


def opened(**options):
    config = UnconditionalConfig(**OPTIONS | options)
    source = task_of(config).open_source()
    return config, source, task_of(config).make_spec(source)


def made(backend, **options):
    """A backend with its state, on the devices that are named "cpu" or "gpu"; PyTorch has the GPU only."""
    config, _, spec = opened(**options)
    if backend == "torch":
        one = TorchBackend(config, spec)
        assert one.device.type == "cuda"
    else:
        one = JaxBackend(config, spec, CPU if backend == "cpu" else GPU)
    one.init_state()
    return one


def batches(**options):
    config, source, spec = opened(**options)
    schedule = make_schedule(config, len(source), 1)
    with assembly.make_loader(task_of(config), spec, source, schedule, num_steps=STEPS) as loader:
        return list(loader)


def steps(backend, several):
    """The numbers of some steps."""
    decays = dict.fromkeys(backend.config.averages, 0.9)
    handles = [backend.train_step(backend.put(batch), RATE, decays) for batch in several]
    return [backend.read(handle) for handle in handles]


def losses(metrics):
    return np.array([one["loss"] for one in metrics])


@pytest.fixture(scope="module")
def expected():
    """The losses of float32 on the CPU."""
    with jax.default_matmul_precision("highest"):
        found = losses(steps(made("cpu"), batches()))
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize(("dtype", "unit"), [(jnp.bfloat16, BF16), (jnp.float16, FP16)])
@pytest.mark.parametrize(("queries", "keys", "channels"), [(256, 256, 40), (64, 128, 64), (1024, 1024, 128)])
def test_cudnn_attention(dtype, unit, queries, keys, channels):
    """Forward and backward, against float64. Weights and result are each rounded once: two roundings at most."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, 4, channels) for length in (queries, keys, keys, queries)]
    q, k, v, grad = (np.asarray(jnp.asarray(rng.standard_normal(shape), dtype)) for shape in shapes)

    def run(q, k, v, grad):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(grad)

    with jax.sharding.use_abstract_mesh(make_mesh(1, 1, GPU).abstract_mesh):
        compiled = jax.jit(run).lower(*(jax.device_put(x, GPU[0]) for x in (q, k, v, grad))).compile()
    assert "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()
    found = compiled(*(jax.device_put(x, GPU[0]) for x in (q, k, v, grad)))
    with jax.enable_x64(True), jax.default_device(CPU[0]):
        right = run(*(jnp.asarray(x.astype(np.float64)) for x in (q, k, v, grad)))
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        error = np.abs(np.asarray(one, np.float64) - np.asarray(other))
        assert error.max() < 2 * unit * np.abs(other).max()


@pytest.mark.parametrize(
    ("options", "products", "unit"),
    [
        ({}, "highest", EXACT),
        ({}, "tensorfloat32", TF32),
        ({"mixed_precision": "bf16"}, None, BF16),
        ({"mixed_precision": "fp16"}, None, FP16),
        ({"mixed_precision": "bf16", "gradient_checkpointing": "minimal"}, None, BF16),
    ],
    ids=["float32", "TF32", "bf16", "fp16", "checkpointed"],
)
def test_steps_of_jax(expected, options, products, unit):
    with jax.default_matmul_precision(products):
        metrics = steps(made("gpu", **options), batches())
    np.testing.assert_allclose(losses(metrics), expected, rtol=unit)
    if unit != EXACT:
        assert (losses(metrics) != expected).all(), "computed in float32"
    assert [one["loss_scale"] for one in metrics if "loss_scale" in one] == [65536.0] * (unit == FP16) * STEPS


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({}, EXACT),
        ({"allow_tf32": True}, TF32),
        ({"mixed_precision": "bf16"}, BF16),
        ({"mixed_precision": "fp16"}, FP16),
        ({"channels_last": True}, EXACT),
        ({"gradient_checkpointing": "minimal"}, EXACT),
        ({"torch_compile": True}, EXACT),
    ],
    ids=["float32", "TF32", "bf16", "fp16", "channels-last", "checkpointed", "compiled"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by PyTorch's own compiler
def test_steps_of_pytorch(expected, options, unit):
    found = losses(steps(made("torch", **options), batches()))
    np.testing.assert_allclose(found, expected, rtol=unit)
    if unit != EXACT:
        assert np.abs(found / expected - 1).max() > 1e-6, "computed in float32"


@pytest.mark.parametrize("backend", ["gpu", "torch"])
def test_a_loss_that_overflows_in_fp16(backend):
    """The step is passed over, bit for bit, and the scale halves; the next one goes on."""
    one = made(backend, mixed_precision="fp16")
    first, large, after = batches()[:3]
    steps(one, [first])
    before = one.state_arrays()
    large = large | {"loss_weights": large["loss_weights"] * np.float32(1e30)}
    assert not np.isfinite(steps(one, [large])[0]["grad_norm"])
    arrays = one.state_arrays()
    assert float(arrays["loss_scale"]) == float(before["loss_scale"]) / 2
    for name, array in before.items():
        if name not in ("loss_scale", "good_steps"):
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert np.isfinite(steps(one, [after])[0]["grad_norm"])
    assert int(one.state_arrays()["count"]) == int(before["count"]) + 1


@pytest.mark.parametrize("backend", ["gpu", "torch"])
def test_8_bit_moments(expected, backend):
    """They are of 8 bits and on the GPU; losses are as near to AdamW's as the CPU's are."""
    one = made(backend, use_8bit_adam=True)
    with jax.default_matmul_precision("highest"):
        found = losses(steps(one, batches()))
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    if backend == "torch":
        state = one.optimizer.optimizer.state
        kept = [value for held in state.values() for value in held.values() if isinstance(value, torch.Tensor)]
        coded = [value for value in kept if value.dtype == torch.uint8]
        assert coded
        assert {value.device.type for value in coded} == {"cuda"}
    else:
        coded = [leaf for leaf in jax.tree.leaves(one.state.opt_state) if leaf.dtype == jnp.uint8]
        assert coded
        assert {device.platform for leaf in coded for device in leaf.devices()} == {"gpu"}


@pytest.mark.parametrize("eight", [False, True], ids=["float32", "8-bit"])
def test_pinned_moments(expected, tmp_path, eight):
    """Moments stay in the host's pinned memory over steps and a restore; nothing else does, and no number changes."""
    options = {"offload_optimizer": True, "use_8bit_adam": eight}
    several = batches()

    def kinds(tree):
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}

    with jax.default_matmul_precision("highest"):
        plain = losses(steps(made("gpu", use_8bit_adam=eight), several))
        whole = made("gpu", **options)
        found = losses(steps(whole, several[:4]))
        assert kinds(whole.state.opt_state) == {"pinned_host"}
        assert kinds(whole.state.params) == {"device"}
        whole.save(tmp_path / "checkpoint-4", {"step": 4})
        whole.wait()
        resumed = made("gpu", **options)
        resumed.restore(tmp_path / "checkpoint-4")
        assert kinds(resumed.state.opt_state) == {"pinned_host"}
        rest = losses(steps(resumed, several[4:]))
    np.testing.assert_allclose([*found, *rest], plain, rtol=EXACT)
    np.testing.assert_allclose([*found, *rest], expected, rtol=2e-2 if eight else EXACT)
