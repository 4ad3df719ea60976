"""The class-conditional transformer: PyTorch's class and our twin of it, files both ways, options, first weights."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers.models.embeddings
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import QUICK, random_params
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel as TheirDiT
from safetensors.numpy import load_file, save_file
from test_models_parity import assert_close, double_timestep_embedding

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.dit import SIZES
from flax_diffusion.core.spec.pipeline import Component, read_component
from flax_diffusion.core.spec.weight_files import COPIED, with_copies
from flax_diffusion.models import FlaxDiTTransformer2DModel, weights
from torch_backend import modules as torch_modules
from torch_backend.names import file_name

SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 5,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned_variance": {"out_channels": 8, "patch_size": 4},
    "odd_patches": {"sample_size": 9, "patch_size": 3, "in_channels": 3},
    "no_bias": {"attention_bias": False, "activation_fn": "gelu", "norm_eps": 1e-3},
    "swiglu": {"activation_fn": "swiglu", "norm_elementwise_affine": True},
    "geglu": {"activation_fn": "geglu", "num_layers": 1},
    "quick": {"activation_fn": "geglu-approximate", "upcast_attention": True, "num_attention_heads": 1},
    "linear_silu": {"activation_fn": "linear-silu", "patch_size": 8, "num_layers": 3},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "rotary": {"rotary": True, "attention_head_dim": 12},
    "rms_norm": {"rms_norm": True, "norm_elementwise_affine": True},
    "all": {"qk_norm": True, "rotary": True, "rms_norm": True, "activation_fn": "swiglu"},
}
FILE = "diffusion_pytorch_model.safetensors"


def made(**config: Any) -> Any:
    return FlaxDiTTransformer2DModel(**config)


def inputs(config: dict[str, Any], size: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    side = config["sample_size"]
    sample = rng.standard_normal((3, config.get("in_channels", 4), *(size or (side, side)))).astype(np.float32)
    return sample, np.array([0, 3, 871]), np.array([4, 0, 5])


def reference(config: dict[str, Any], folder: Path) -> Any:
    """Write random weights, and load them by Diffusers' class."""
    model = made(**config)
    model.save_pretrained(folder, random_params(model))
    return TheirDiT.from_pretrained(folder).eval()


def flax_results(config: dict[str, Any], folder: Path, dtype: Any, size: Any = None) -> Any:
    """Return output, gradients of a random projection of it by PyTorch name, and the projection."""
    model: Any
    model, params = FlaxDiTTransformer2DModel.from_pretrained(folder, dtype=dtype, param_dtype=dtype)
    given = inputs(config, size)
    shape = (*given[0].shape[:1], config.get("out_channels") or given[0].shape[1], *given[0].shape[2:])
    cotangent = np.random.default_rng(2).standard_normal(shape)

    def loss(params: Any) -> Any:
        output = model.apply({"params": params}, *given).sample
        return jnp.vdot(jnp.asarray(cotangent, output.dtype), output), output

    gradients, output = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)
    assert output.dtype == dtype
    return np.asarray(output), dict(weights.to_torch(gradients)), cotangent


def torch_results(model: Any, given: Any, cotangent: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return output and gradients; those of the copies of the embedder are added up, as they are one here."""
    sample, times, labels = map(torch.from_numpy, given)
    output = model(sample.to(model.proj_out_2.weight.dtype), times, labels).sample
    (torch.from_numpy(cotangent).to(output.dtype) * output).sum().backward()
    gradients: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():
        first = COPIED.sub(r"\1.0\3", file_name("DiTTransformer2DModel", name))
        gradients[first] = gradients.get(first, 0) + parameter.grad.numpy()
    return output.detach().numpy(), gradients


def compare(config: dict[str, Any], folder: Path, model: Any, dtype: Any, tolerance: float, size: Any = None) -> None:
    ours, our_gradients, cotangent = flax_results(config, folder, dtype, size)
    model = model.to(torch.float64 if dtype == jnp.float64 else torch.float32)
    theirs, gradients = torch_results(model, inputs(config, size), cotangent)
    assert_close({"output": ours}, {"output": theirs}, tolerance)
    assert_close(our_gradients, gradients, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_class_in_float64(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.models.embeddings, "get_timestep_embedding", double_timestep_embedding)
    config = SMALL | CASES[name]
    model = reference(config, tmp_path)
    with jax.enable_x64(True):
        compare(config, tmp_path, model, jnp.float64, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_class_in_float32(name: str, tmp_path: Path) -> None:
    config = SMALL | CASES[name]
    compare(config, tmp_path, reference(config, tmp_path), jnp.float32, 1e-5)


def twin(config: dict[str, Any], folder: Path) -> Any:
    return torch_modules.load(Component(kind="DiTTransformer2DModel", config=config, weights=str(folder)))


@pytest.mark.parametrize("name", [*OPTIONS, "learned_variance", "no_bias"])
def test_twin(name: str, tmp_path: Path) -> None:
    """The twin computes the options too, in any shape; in training it drops no labels."""
    config = SMALL | (OPTIONS | CASES)[name]
    model = made(**config)
    model.save_files(tmp_path, random_params(model))
    own = twin(config, tmp_path).train()
    compare(config, tmp_path, own, jnp.float32, 1e-5)
    torch_modules._embed_in_float64(own)
    own.zero_grad()
    with jax.enable_x64(True):
        compare(config, tmp_path, own, jnp.float64, 1e-10, (16, 8))


@pytest.mark.parametrize("checkpointing", [True, "minimal"])
def test_checkpointing_changes_no_gradient(checkpointing: Any) -> None:
    config = SMALL | OPTIONS["all"] | {"dropout": 0.3}
    plain = made(**config)
    params, key = random_params(plain), {"dropout": jax.random.key(3)}

    def gradients(model: Any) -> Any:
        def loss(params: Any) -> Any:
            return jnp.square(model.apply({"params": params}, *inputs(config), train=True, rngs=key).sample).mean()

        return dict(weights.to_torch(jax.jit(jax.grad(loss), compiler_options=QUICK)(params)))

    expected = gradients(plain)
    assert_close(gradients(plain.clone(gradient_checkpointing=checkpointing)), expected, 1e-6)
    still = dict(weights.to_torch(params))
    assert not any(np.array_equal(expected[name], np.zeros_like(own)) for name, own in still.items())


def test_twin_checkpoints_its_blocks(tmp_path: Path) -> None:
    config = SMALL | OPTIONS["all"]
    model = made(**config)
    model.save_files(tmp_path, random_params(model))
    cotangent = np.ones((3, 4, 8, 8))
    plain, again = twin(config, tmp_path), twin(config, tmp_path)
    again.enable_gradient_checkpointing()
    assert again.is_gradient_checkpointing
    expected = torch_results(plain, inputs(config), cotangent)
    output, gradients = torch_results(again, inputs(config), cotangent)
    np.testing.assert_array_equal(output, expected[0])
    assert_close(gradients, expected[1], 1e-6)


def test_files_of_pytorch_and_of_the_twin(tmp_path: Path) -> None:
    """Diffusers' copies are one here and as many again in what either backend writes, tensor for tensor."""
    config = SMALL | {"out_channels": 8}
    theirs = TheirDiT(**config)
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / FILE)
    model, params = FlaxDiTTransformer2DModel.from_pretrained(tmp_path / "theirs")
    assert not [name for name in weights.torch_shapes(params) if COPIED.match(name) and "blocks.0." not in name]
    model.save_pretrained(tmp_path / "ours", params)
    twin(config, tmp_path / "theirs").save_pretrained(tmp_path / "twin", safe_serialization=True)
    keys = {"_class_name", *SMALL, "out_channels", "norm_num_groups", "norm_type"}
    for name in ("ours", "twin"):
        written = load_file(tmp_path / name / FILE)
        assert written.keys() == stored.keys()
        for key, array in stored.items():
            np.testing.assert_array_equal(written[key], array)
        own, their = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in (name, "theirs"))
        assert keys <= own.keys()
        assert own == {key: value for key, value in their.items() if key != "_diffusers_version"}
        _, info = TheirDiT.from_pretrained(tmp_path / name, output_loading_info=True)
        assert {key: list(value) for key, value in info.items() if value} == {}
    model.save_pretrained(tmp_path / "shards", params, max_shard_bytes=30_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    _, again = FlaxDiTTransformer2DModel.from_pretrained(tmp_path / "shards")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_copies_that_differ_are_named(tmp_path: Path) -> None:
    reference(SMALL, tmp_path)
    stored = load_file(tmp_path / FILE)
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    stored[name] = stored[name] + np.float32(1e-6)
    save_file(stored, tmp_path / FILE)
    message = (
        r"diffusion_pytorch_model.safetensors: transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\."
        r"weight and transformer_blocks\.1\.norm1\.emb\.class_embedder\.embedding_table\.weight differ, and .*: use"
    )
    for load in (FlaxDiTTransformer2DModel.from_pretrained, lambda folder: twin(SMALL, folder)):
        with pytest.raises(WeightsError, match=message):
            load(tmp_path)


def test_published_configs_of_the_old_class(tmp_path: Path) -> None:
    """DiT-XL/2 as it was published: its class was Transformer2DModel, which had more keys."""
    model = made(**SMALL, out_channels=8)
    params = random_params(model)
    model.save_pretrained(tmp_path, params)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"cross_attention_dim": None, "double_self_attention": False, "num_vector_embeds": None}
    old |= {"only_cross_attention": False, "use_linear_projection": False, "_class_name": "Transformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config | old))
    again, loaded = FlaxDiTTransformer2DModel.from_pretrained(tmp_path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    read = read_component(tmp_path, "DiTTransformer2DModel", str(tmp_path), None, None, None)
    own = torch_modules.load(read)
    np.testing.assert_array_equal(own.proj_out_2.weight.detach().numpy(), params["proj_out_2"]["kernel"].T)
    (tmp_path / "config.json").write_text(json.dumps(config | old | {"norm_type": "ada_norm_single"}))
    with pytest.raises(ConfigError, match="does not support norm_type='ada_norm_single'"):
        FlaxDiTTransformer2DModel.from_pretrained(tmp_path)


# From the table of the paper's sizes, in millions, to tell a wrong config from a right one.
MILLIONS = {"DiT-S/2": 33, "DiT-B/4": 131, "DiT-L/8": 459, "DiT-XL/2": 675, "SiT-XL/2": 675}


@pytest.mark.parametrize("name", MILLIONS)
def test_names_and_shapes_of_the_papers_sizes(name: str) -> None:
    config = SIZES[name] | {"out_channels": 8}
    shapes = weights.torch_shapes(made(**config).params_shape())
    with torch.device("meta"):
        theirs = TheirDiT(**config)
        own = torch_modules.make(Component(kind="DiTTransformer2DModel", config=config))
    expected = {key: tuple(value.shape) for key, value in theirs.named_parameters()}
    written = with_copies((key, np.broadcast_to(np.float32(0), shape)) for key, shape in shapes.items())
    assert {key: array.shape for key, array in written} == expected
    kind = type(own).__name__
    assert {file_name(kind, key): tuple(value.shape) for key, value in own.named_parameters()} == shapes
    assert sum(map(math.prod, shapes.values())) / 1e6 == pytest.approx(MILLIONS[name], rel=0.02)


def test_sizes() -> None:
    assert len(SIZES) == 24
    assert SIZES["DiT-B/8"] == {
        "num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "patch_size": 8,
    }  # fmt: skip


def test_first_weights_are_the_papers() -> None:
    """New blocks change nothing, a new model predicts zero, and both backends draw the same."""
    config = SMALL | {"num_attention_heads": 8}
    model = made(**config)
    params = model.init_weights(7)
    assert not np.asarray(model.apply({"params": params}, *inputs(config)).sample).any()
    drawn = dict(weights.to_torch(params))
    own = torch_modules._draw(Component(kind="DiTTransformer2DModel", config=config), 7)
    for name, parameter in own.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), drawn[file_name("DiTTransformer2DModel", name)])
    first = "transformer_blocks.0."
    for name in ("norm1.emb.timestep_embedder.linear_1", "norm1.emb.class_embedder.embedding_table"):
        assert drawn[f"{first}{name}.weight"].std() == pytest.approx(0.02, rel=0.1)
    wide = drawn[f"{first}ff.net.0.proj.weight"]
    assert np.abs(wide).max() == pytest.approx((6 / (64 + 256)) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_refused_by_diffusers(name: str, tmp_path: Path) -> None:
    """`save_pretrained` does not write them; a run does, in a form that both backends open and Diffusers does not."""
    config = SMALL | OPTIONS[name]
    model = made(**config)
    params = random_params(model)
    with pytest.raises(ConfigError, match=r"Diffusers' DiTTransformer2DModel has no such option"):
        model.save_pretrained(tmp_path / "no", params)
    assert not (tmp_path / "no").exists()
    model.save_files(tmp_path / "ours", params)
    again, loaded = FlaxDiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert FlaxDiTTransformer2DModel.from_config(model.config).config == model.config
    own = twin(folders.model_config(json.loads((tmp_path / "ours/config.json").read_text())), tmp_path / "ours")
    own.save_pretrained(tmp_path / "twin")
    assert json.loads((tmp_path / "twin/config.json").read_text()) == json.loads(
        (tmp_path / "ours/config.json").read_text()
    )
    jax.tree.map(np.testing.assert_array_equal, FlaxDiTTransformer2DModel.from_pretrained(tmp_path / "twin")[1], loaded)
    with pytest.raises(NotImplementedError, match="ada_norm_zero_with_options"):
        TheirDiT.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, r"patch_size=3 does not divide sample_size=8"),
        ({"attention_head_dim": 3}, "is 6: make it a multiple of 4"),
        ({"attention_head_dim": 6, "rotary": True}, "attention_head_dim=6: make it a multiple of 4"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"norm_type": "layer_norm"}, "norm_type.*'layer_norm'"),
        ({"qk_norm": "yes"}, "qk_norm is 'yes'"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**(SMALL | changes))
    with pytest.raises(ConfigError, match=message):
        torch_modules.make(Component(kind="DiTTransformer2DModel", config=SMALL | changes))


def test_activations_that_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not support activation_fn='relu': choose one of 'gelu', .*'swiglu'"):
        made(**SMALL, activation_fn="relu")


def test_bfloat16_is_as_exact_as_its_rounding() -> None:
    config = SMALL | OPTIONS["all"]
    params = random_params(made(**config))
    exact, rounded = (
        np.asarray(made(**config, dtype=dtype).apply({"params": params}, *inputs(config)).sample)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.bfloat16
    assert np.linalg.norm(rounded.astype(np.float32) - exact) < 4 * 2**-8 * np.linalg.norm(exact)


def test_a_sample_that_does_not_fit() -> None:
    model = made(**SMALL)
    with pytest.raises(ConfigError, match=r"samples of 8x7 do not fit this transformer: .* multiples of 2"):
        model.init(jax.random.key(0), *inputs(SMALL, (8, 7)))
