"""Layers whose form matters, initialisation, and how the models run: dtypes, dropout, rematerialisation."""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, QUICK, draw, random_params
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Reference
from diffusers.models.embeddings import get_timestep_embedding

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.models import flash, weights
from flax_diffusion.models.attention import attention, gated_gelu
from flax_diffusion.models.layers import GroupNorm, LayerConfig, timestep_embedding, upsample_nearest
from flax_diffusion.models.norms import group_norm
from flax_diffusion.models.outputs import FlaxDiagonalGaussianDistribution
from flax_diffusion.models.remat import checkpointed


def made(name: str, **changes: Any) -> tuple[Any, Any, dict[str, Any]]:
    case = CASES[name]
    model = case.flax.from_config(case.config, **changes)
    return model, random_params(model), draw(case)


def apply(model: Any, params: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """Run a model; `options` are arguments that need not be traced."""
    run = jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs, **options), compiler_options=QUICK)
    return run(params, inputs)


@pytest.mark.parametrize(("dim", "flip", "shift"), [(320, True, 0), (128, False, 1), (7, True, 0)])
def test_timestep_embedding(dim: int, flip: bool, shift: int) -> None:
    steps = np.arange(1000)
    ours = timestep_embedding(jnp.array(steps), dim, flip_sin_to_cos=flip, freq_shift=shift)
    theirs = get_timestep_embedding(torch.from_numpy(steps), dim, flip, shift).numpy()
    # One unit in the last place of a frequency is 6e-8 of it: 6e-5 radians at timestep 999.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=7e-5)
    assert ours.dtype == jnp.float32


def test_nearest_upsampling_to_any_size() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 3)).astype(np.float32)
    for size in ((8, 10), (7, 9), (8, 9)):
        theirs = torch.nn.functional.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size=size, mode="nearest")
        np.testing.assert_array_equal(upsample_nearest(jnp.array(x), size), theirs.permute(0, 2, 3, 1))


def test_group_norm_of_large_means() -> None:
    # The one-pass variance E[x²] − E[x]² would lose every digit here.
    x = 1e4 + np.random.default_rng(0).standard_normal((2, 6, 6, 8)).astype(np.float32)
    norm = GroupNorm(LayerConfig(groups=4, eps=1e-5), 1e-5)
    ours = norm.apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    exact = torch.nn.functional.group_norm(torch.from_numpy(x).double().permute(0, 3, 1, 2), 4, eps=1e-5)
    np.testing.assert_allclose(ours, exact.permute(0, 2, 3, 1), atol=2e-3)


@pytest.mark.parametrize("act", [None, "silu"])
def test_group_norm_and_its_gradient(act: str | None) -> None:
    rng = np.random.default_rng(0)
    x, grad = (rng.standard_normal((2, 5, 3, 8)) for _ in range(2))
    scale, bias = (rng.standard_normal(8) for _ in range(2))
    theirs = [torch.tensor(array, requires_grad=True) for array in (x, scale, bias)]
    out = torch.nn.functional.group_norm(theirs[0].permute(0, 3, 1, 2), 4, *theirs[1:], eps=1e-5)
    out = (torch.nn.functional.silu(out) if act else out).permute(0, 2, 3, 1)
    out.backward(torch.from_numpy(grad))
    with jax.enable_x64(True):
        ours, pull = jax.vjp(lambda *inputs: group_norm(*inputs, 4, 1e-5, act and jax.nn.silu), x, scale, bias)
        np.testing.assert_allclose(ours, out.detach(), atol=1e-13)
        for gradient, tensor in zip(pull(grad), theirs, strict=True):
            np.testing.assert_allclose(gradient, tensor.grad, atol=1e-12)


def test_group_norm_of_16_bits_is_that_of_32() -> None:
    x = jnp.asarray(3 + np.random.default_rng(0).standard_normal((2, 16, 16, 8)), jnp.bfloat16)
    inputs = (jnp.ones(8), jnp.zeros(8), 4, 1e-5)
    np.testing.assert_allclose(group_norm(x, *inputs), group_norm(x.astype(jnp.float32), *inputs), atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (128, 384), (1152, 128), (128, 77), (128, 500)])
def test_flash_attention_is_attention(queries: int, keys: int) -> None:
    """Also where queries and keys come in several blocks."""
    rng = np.random.default_rng(0)
    q, k, v, grad = (
        jnp.asarray(rng.standard_normal((2, length, 2, 40)), jnp.float32) for length in (queries, keys, keys, queries)
    )
    theirs, pull_theirs = jax.vjp(attention, q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "MIN_BLOCK_QUERIES", 384)
        patch.setattr(flash, "MAX_BLOCK_SCORES", 0)
        patch.setattr(flash, "MAX_UNROLLED_KEYS", 256)
        ours, pull = jax.vjp(lambda *inputs: flash.flash_attention(*inputs, interpret=True), q, k, v)
        gradients = pull(grad)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for gradient, expected in zip(gradients, pull_theirs(grad), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "shape", "keys", "expected"),
    [
        ("TPU v5 lite", (4, 1024, 8, 40), 1024, True),
        ("TPU v5 lite", (4, 1024, 8, 40), 77, True),
        ("TPU v5 lite", (4, 77, 8, 40), 77, False),
        ("TPU v5 lite", (2, 1024, 8, 40), 1024, False),  # fewer images than devices
        ("TPU v5 lite", (4, 4096, 1, 512), 4096, True),
        ("TPU v5 lite", (4, 16384, 1, 512), 16384, False),  # more than the chip's memory
        ("TPU v4", (4, 16384, 8, 40), 16384, True),
        ("TPU v4", (4, 16384, 8, 64), 16384, False),
    ],
)
def test_where_flash_attention_runs(kind, shape, keys, expected) -> None:
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((4,), ("data",), abstract_device=device)
    q, k = (jax.ShapeDtypeStruct((shape[0], length, *shape[2:]), jnp.bfloat16) for length in (shape[1], keys))
    with jax.sharding.use_abstract_mesh(mesh):
        assert flash.has_kernel(mesh, q, k) == expected
    assert not flash.has_kernel(jax.sharding.AbstractMesh((), ()), q, k)
    assert not flash.has_kernel(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]).abstract_mesh, q, k)


def patch_gpu(monkeypatch: Any, capability: str) -> None:
    """Answers what a GPU is asked for while a program is traced: what it is and which cuDNN it has."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    for check in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_: 91000)


@pytest.mark.parametrize(
    ("shape", "capability", "dtype", "expected"),
    [
        ((4, 4096, 8, 40), "9.0", jnp.bfloat16, True),
        ((4, 4096, 8, 40), "9.0", jnp.float16, True),
        ((4, 4096, 8, 40), "9.0", jnp.float32, False),
        ((4, 4096, 8, 40), "7.5", jnp.bfloat16, False),
        ((4, 4096, 8, 160), "9.0", jnp.bfloat16, False),
        ((4, 77, 8, 40), "9.0", jnp.bfloat16, False),
    ],
)
def test_where_cudnn_runs(monkeypatch, shape, capability, dtype, expected) -> None:
    """In the program that a GPU is given, forward and backward. `tests/gpu` sees what the kernel itself computes."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    gpu = jax.sharding.AbstractMesh((4,), ("data",), abstract_device=device)
    patch_gpu(monkeypatch, capability)
    tokens = jax.ShapeDtypeStruct(shape, dtype)
    loss = jax.grad(lambda *inputs: attention(*inputs).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with jax.sharding.use_abstract_mesh(gpu):
        text = jax.jit(loss).trace(tokens, tokens, tokens).lower(lowering_platforms=("cuda",)).as_text()
    kernels = set(re.findall(r"@(__cudnn\$\w+)", text))
    assert kernels == ({"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} if expected else set())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("attend", [attention, functools.partial(flash.flash_attention, interpret=True)])
def test_scores_of_16_bits_are_of_32(attend: Any, dtype: Any) -> None:
    """As a config's `upcast_attention` asks. Two channels add 15,625 to each; 16 bits could not tell them apart."""
    rng = np.random.default_rng(0)
    q, k, v, grad = (jnp.asarray(rng.standard_normal((1, 128, 1, 64)), dtype) for _ in range(4))
    q, k = (x.at[..., :2].set(250) for x in (q, k))
    ours, pull = jax.vjp(attend, q, k, v)
    found = (ours, *pull(grad))
    with jax.enable_x64(True):
        theirs, pull = jax.vjp(attention, *(x.astype(jnp.float64) for x in (q, k, v)))
        expected = (theirs, *pull(grad.astype(jnp.float64)))
    for one, other in zip(found, expected, strict=True):
        difference = np.abs(np.asarray(one, np.float64) - np.asarray(other))[..., 2:]
        assert difference.max() < 2**-7 * np.abs(other).max()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)]
)
def test_gated_gelu(dtype: torch.dtype, tolerance: float) -> None:
    """Against PyTorch in float64, of the same inputs; the gradients too."""
    x, gate, grad = (4 * torch.from_numpy(np.random.default_rng(0).standard_normal((3, 1000)))).to(dtype)
    inputs = [t.double().clone().requires_grad_() for t in (x, gate)]
    theirs = inputs[0] * torch.nn.functional.gelu(inputs[1])
    gradients = torch.autograd.grad(theirs, inputs, grad.double())
    with jax.enable_x64(True):
        ours, pull = jax.vjp(gated_gelu, *(jnp.asarray(t.double().numpy(), str(dtype)[6:]) for t in (x, gate)))
        found = (ours, *pull(jnp.asarray(grad.double().numpy(), ours.dtype)))
    for one, other in zip(found, (theirs.detach(), *gradients), strict=True):
        assert one.dtype == str(dtype)[6:]
        assert np.abs(np.asarray(one, np.float64) - other.numpy()).max() < tolerance * other.abs().max()


def test_attention_masks() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 3, 4)).astype(np.float32) for _ in range(3))
    mask = np.tril(np.ones((5, 5), bool))[None, None]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(t).double().transpose(1, 2) for t in (q, k, v)), attn_mask=torch.from_numpy(mask)
    ).transpose(1, 2)
    np.testing.assert_allclose(attention(q, k, v, mask), theirs, atol=1e-6)
    with jax.enable_x64(True):
        ours = attention(*(jnp.array(t, jnp.float64) for t in (q, k, v)), mask)
        np.testing.assert_allclose(ours, theirs, atol=1e-14)


def test_initialisation() -> None:
    model = CASES["tutorial"].flax.from_config(
        CASES["tutorial"].config, block_out_channels=(32, 64), add_attention=False
    )
    params = model.init_weights(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, model.init_weights(jax.random.key(0)))
    other = model.init_weights(jax.random.key(1))
    kernel = params["mid_block"]["resnets_0"]["conv1"]["kernel"]
    bound = (9 * 64) ** -0.5
    assert float(jnp.abs(kernel).max()) == pytest.approx(bound, rel=1e-3)
    assert float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    for values in (other["mid_block"]["resnets_0"]["conv1"], params["mid_block"]["resnets_0"]["conv2"]):
        assert abs(np.corrcoef(kernel.ravel(), values["kernel"].ravel())[0, 1]) < 0.02
    shifted = np.corrcoef(kernel.ravel()[1:], kernel.ravel()[:-1])[0, 1]
    assert abs(shifted) < 0.02
    assert not params["conv_in"]["bias"].any()
    clip = CASES["clip"].flax.from_config(CASES["clip"].config, vocab_size=2000)
    table = clip.init_weights(jax.random.key(0))["text_model"]["embeddings"]["token_embedding"]["embedding"]
    assert float(table.std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("name", ["sd2", "clip"])
def test_bfloat16_keeps_close_to_float32(name: str) -> None:
    model, params, inputs = made(name)
    full = apply(model, params, inputs)[0]
    half = apply(model.clone(dtype=jnp.bfloat16), params, inputs)[0]
    assert half.dtype == jnp.bfloat16
    assert np.linalg.norm(half.astype(np.float32) - full) < 0.03 * np.linalg.norm(full)


def gradient_of(model: Any, inputs: dict[str, Any]) -> Any:
    return jax.grad(lambda params: jnp.square(model.apply({"params": params}, **inputs)[0]).mean())


def kinds_of(program: Any) -> Iterator[str]:
    """Names of a program's operations; products but those in batches, which are attention's, are `product`."""
    for one in program.eqns:
        alone = one.primitive.name == "dot_general" and not any(one.params["dimension_numbers"][1])
        yield "product" if alone else one.primitive.name
        for value in one.params.values():
            inner = getattr(value, "jaxpr", value)
            yield from kinds_of(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize("name", ["tutorial", "sd1", "vae", "clip"])
def test_what_the_backward_pass_computes_again(name: str) -> None:
    """Nothing; without products (but attention's, where no kernel has them) and convolutions; or those too."""
    model, params, inputs = made(name)
    counts = []
    for how in (False, "minimal", True):
        changed = model.clone(gradient_checkpointing=how)
        assert changed.config == model.config
        kinds = Counter(kinds_of(jax.make_jaxpr(gradient_of(changed, inputs))(params).jaxpr))
        counts.append((kinds["product"] + kinds["conv_general_dilated"], kinds["rsqrt"]))
    (products, norms), minimal, full = counts
    assert minimal[0] == products < full[0]
    assert norms < minimal[1] == full[1]


@pytest.mark.parametrize("kernel", ["pallas", "cudnn"])
def test_minimal_checkpointing_keeps_what_attention_kernels_made(kernel: str, monkeypatch: Any) -> None:
    patch_gpu(monkeypatch, "9.0")
    attend = {
        "pallas": functools.partial(flash.flash_attention, interpret=True),
        "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
    }[kernel]

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return attend(x, x, x)

    def kernels(how: Any) -> int:
        layer = checkpointed(Layer, how)()
        loss = jax.grad(lambda x: layer.apply({}, x).astype(jnp.float32).sum())
        kinds = kinds_of(jax.make_jaxpr(loss)(jnp.zeros((2, 128, 2, 64), jnp.bfloat16)).jaxpr)
        return sum(kind == "pallas_call" or kind.startswith("dot_product_attention") for kind in kinds)

    assert [kernels(how) for how in (False, "minimal", True)] == [2, 2, 3]


@pytest.mark.parametrize("how", ["minimal", True])
def test_gradient_checkpointing_changes_nothing(how: Any) -> None:
    model, params, inputs = made("clip")
    changed = model.clone(gradient_checkpointing=how)
    results = [jax.jit(gradient_of(one, inputs), compiler_options=QUICK)(params) for one in (model, changed)]
    flat = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in results]
    assert jnp.linalg.norm(flat[0] - flat[1]) <= 1e-6 * jnp.linalg.norm(flat[0])


def test_gradient_checkpointing_of_an_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"gradient_checkpointing is 'minimum'.*did you mean 'minimal'"):
        made("clip")[0].clone(gradient_checkpointing="minimum")


def test_dropout_needs_training_and_a_key() -> None:
    model, params, inputs = made("tutorial", dropout=0.5)
    plain = apply(model, params, inputs).sample
    np.testing.assert_array_equal(plain, apply(made("tutorial")[0], params, inputs).sample)
    run = jax.jit(
        lambda key: model.apply({"params": params}, **inputs, train=True, rngs={"dropout": key}).sample,
        compiler_options=QUICK,
    )
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


def test_controlnet_residuals() -> None:
    case = CASES["sd1"]
    torch.manual_seed(0)
    reference = case.torch(**case.config).eval()
    model, params, inputs = made("sd1")
    named = {key: torch.from_numpy(np.array(value)) for key, value in inputs.items()}
    named["timestep"] = named.pop("timesteps")
    shapes = [(2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4), (2, 16, 4, 4)]
    rng = np.random.default_rng(3)
    down = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    mid = rng.standard_normal((2, 16, 4, 4)).astype(np.float32)
    state = {name: torch.from_numpy(np.array(value)) for name, value in weights.to_torch(params)}
    reference.load_state_dict(state)
    with torch.no_grad():
        theirs = reference(
            **named,
            down_block_additional_residuals=[torch.from_numpy(d) for d in down],
            mid_block_additional_residual=torch.from_numpy(mid),
        ).sample.numpy()
    down, mid = [residual.transpose(0, 2, 3, 1) for residual in down], mid.transpose(0, 2, 3, 1)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    ours = apply(model, params, inputs | residuals).sample
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    with pytest.raises(ConfigError, match="no mid residual and 4 down"):
        model.apply({"params": params}, **inputs, down_block_additional_residuals=down)
    residuals["mid_block_additional_residual"] = mid.transpose(0, 3, 1, 2)
    with pytest.raises(ConfigError, match=r"shape \(2, 16, 4, 4\) where .* \(2, 4, 4, 16\): channels come last"):
        model.apply({"params": params}, **inputs, **residuals)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tutorial", {"class_labels": np.zeros(2, int)}, "without class embedding"),
        ("tutorial", {"sample": np.zeros((2, 3, 7, 8))}, "multiples of 2"),
        ("classes", {"class_labels": None}, "pass class_labels"),
        ("sd1", {"class_labels": np.zeros(2, int)}, "takes no class_labels"),
        ("sd1", {"added_cond_kwargs": {"text_embeds": np.zeros((2, 3))}}, "addition_embed_type is None"),
        ("sd1", {"timestep_cond": np.zeros((2, 3))}, "time_cond_proj_dim is None"),
        ("sdxl", {"added_cond_kwargs": {"text_embeds": np.zeros((2, 10))}}, "'time_ids'"),
        ("vae", {"sample": np.zeros((2, 8, 8, 3))}, r"must be \(B, 3, H, W\): got"),
        ("clip", {"input_ids": np.zeros((1, 10), int), "attention_mask": None}, "10 tokens exceed"),
    ],
)
def test_wrong_inputs(name: str, change: dict[str, Any], message: str) -> None:
    case = CASES[name]
    model = case.flax.from_config(case.config)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda params: model.apply({"params": params}, **(draw(case) | change)), model.params_shape())


def test_latents_with_other_channels() -> None:
    model, params, _ = made("vae")
    with pytest.raises(ConfigError, match=r"latents must be \(B, h, w, 4\) or \(B, 4, h, w\): got .*\(1, 3, 2, 2\)"):
        model.apply({"params": params}, jnp.zeros((1, 3, 2, 2)), method="decode")


def test_posterior() -> None:
    rng = np.random.default_rng(0)
    mean, logvar, noise, others, logvars = (jnp.array(rng.standard_normal((2, 3, 3, 4)), jnp.float32) for _ in range(5))
    moments = jnp.concatenate([mean, logvar], axis=-1)
    posterior = FlaxDiagonalGaussianDistribution(moments)
    np.testing.assert_allclose(posterior.sample_with(noise), mean + jnp.exp(0.5 * logvar) * noise, rtol=1e-6)
    np.testing.assert_allclose(posterior.var, posterior.std**2, rtol=1e-5)
    key = jax.random.key(0)
    expected = posterior.sample_with(jax.random.normal(key, mean.shape))
    np.testing.assert_array_equal(posterior.sample(key), expected)

    def channels_first(array: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array).transpose(0, 3, 1, 2).copy())

    other = jnp.concatenate([others, logvars], axis=-1)
    theirs, theirs_other = Reference(channels_first(moments)), Reference(channels_first(other))
    np.testing.assert_allclose(posterior.kl(), theirs.kl(), rtol=1e-5)
    between = posterior.kl(FlaxDiagonalGaussianDistribution(other))
    np.testing.assert_allclose(between, theirs.kl(theirs_other), rtol=1e-5)
    np.testing.assert_allclose(posterior.nll(noise), theirs.nll(channels_first(noise)), rtol=1e-5)
    far = FlaxDiagonalGaussianDistribution(100 * moments)
    assert far.logvar.min() == -30
    assert far.logvar.max() == 20


def test_a_posterior_without_variance() -> None:
    moments = jnp.ones((2, 3, 3, 8))
    posterior = jax.jit(lambda array: FlaxDiagonalGaussianDistribution(array, deterministic=True))(moments)
    np.testing.assert_array_equal(posterior.sample(jax.random.key(0)), moments[..., :4])
    assert not posterior.std.any()
    assert not posterior.kl().any()
    assert not posterior.nll(posterior.mean).any()


def test_outputs_index_like_tuples() -> None:
    model, params, inputs = made("clip")
    output = jax.eval_shape(lambda: model.apply({"params": params}, **inputs, output_hidden_states=True))
    assert output[0] is output.last_hidden_state
    assert output["pooler_output"] is output[1]
    assert len(output[2]) == 3
    short = jax.eval_shape(lambda: model.apply({"params": params}, **inputs, return_dict=False))
    assert [value.shape for value in short] == [output[0].shape, output[1].shape]
