"""Code that was written for Transformers' Flax classes runs: their constructor, parameters, calls and files."""

import json
from pathlib import Path
from typing import Any

import flax.jax_utils
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import CLIP

from flax_diffusion import FlaxCLIPModel, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection, FlaxT5EncoderModel
from flax_diffusion.core.errors import ConfigError, WeightsError

IDS = np.array([[38, 4, 17, 39, 39, 39]])
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder with PyTorch's files of a text encoder in a subfolder."""
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).save_pretrained(tmp_path / "text_encoder")
    return tmp_path


def test_a_training_script(pipeline: Path, tmp_path: Path) -> None:
    """The calls of train_text_to_image_flax.py, and of textual_inversion_flax.py, which adds a token."""
    text_encoder = FlaxCLIPTextModel.from_pretrained(
        pipeline, from_pt=True, subfolder="text_encoder", dtype=jnp.float32, cache_dir=tmp_path, token=None
    )
    params = text_encoder.params

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return text_encoder(IDS, params=params, dropout_rng=jax.random.key(0), train=True)[0].sum()

    gradient = jax.grad(loss)(params)
    layer = gradient["text_model"]["encoder"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    assert layer.shape == (16, 16)

    text_encoder.config.vocab_size = 41
    table = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    larger = jnp.zeros((41, 16)).at[:40].set(table)
    params["text_model"]["embeddings"]["token_embedding"]["embedding"] = larger
    text_encoder.params = params
    text_encoder.save_pretrained(tmp_path / "new", params=params)
    assert transformers.CLIPTextModel.from_pretrained(tmp_path / "new").config.vocab_size == 41


def test_parameters_of_all_devices() -> None:
    """Parameters that `replicate` gave an axis of devices may be set, and are used inside pmap."""
    model = FlaxCLIPTextModel(CLIP)
    expected, whole = model(IDS)[0], model.params
    model.params = flax.jax_utils.replicate(whole)
    encode = jax.pmap(lambda params, ids: model(ids, params=params)[0])
    count = jax.local_device_count()
    states = encode(model.params, np.stack([IDS] * count))
    np.testing.assert_allclose(states, np.stack([expected] * count), atol=1e-5)
    with pytest.raises(WeightsError, match="instead of"):
        model.params = jax.tree.map(lambda leaf: leaf[None] if leaf.ndim == 1 else leaf, whole)


def test_constructor() -> None:
    config = transformers.CLIPTextConfig(**CLIP)
    model = FlaxCLIPTextModel(config, seed=1, dtype=jnp.bfloat16)
    assert model.config is config
    assert (model.dtype, model.framework, model.input_shape) == (jnp.bfloat16, "flax", (1, 1))
    assert model.required_params == set(flax.traverse_util.flatten_dict(model.params))
    assert model(IDS).last_hidden_state.dtype == jnp.bfloat16
    same, other = FlaxCLIPTextModel(CLIP, seed=1), FlaxCLIPTextModel(CLIP, seed=2)
    jax.tree.map(np.testing.assert_array_equal, same.params, model.params)
    assert not jnp.array_equal(*(jax.tree.leaves(m.params)[0] for m in (same, other)))
    assert same.config.hidden_size == 16
    assert same.config.layer_norm_eps == 1e-5


def test_parameters_outside_the_model(pipeline: Path) -> None:
    model, params = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", _do_init=False)
    model(IDS, params=params)
    with pytest.raises(WeightsError, match="holds no parameters"):
        model(IDS)
    shapes = jax.eval_shape(lambda key: model.init_weights(key, (1, 1)), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_outputs() -> None:
    model = FlaxCLIPTextModel(CLIP)
    output = model(IDS)
    assert list(output) == ["last_hidden_state", "pooler_output"]
    assert output["pooler_output"] is output[1] is output.pooler_output
    assert dict(output.items()).keys() == {"last_hidden_state", "pooler_output"}
    assert len(output.values()) == len(output) == 2
    assert isinstance(model(IDS, return_dict=False), tuple)
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 3
    assert "attentions" not in model(IDS)


def test_files_of_a_flax_release(tmp_path: Path) -> None:
    model = FlaxCLIPTextModelWithProjection(CLIP, seed=4)
    model.save_pretrained(tmp_path, safe_serialization=False)
    stored = flax.serialization.msgpack_restore((tmp_path / "flax_model.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, stored, model.params)
    again = FlaxCLIPTextModelWithProjection.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_parts_of_larger_models(tmp_path: Path) -> None:
    """A text encoder comes out of a whole CLIP, and an encoder out of a whole T5."""
    whole = transformers.CLIPConfig(
        text_config=CLIP, vision_config=VISION | {"image_size": 8, "patch_size": 4}, projection_dim=6
    )
    transformers.CLIPModel(whole).save_pretrained(tmp_path / "clip")
    text = FlaxCLIPTextModel.from_pretrained(tmp_path / "clip")
    assert text.config.hidden_size == 16
    full = FlaxCLIPModel.from_pretrained(tmp_path / "clip")
    jax.tree.map(np.testing.assert_array_equal, text.params["text_model"], full.params["text_model"])
    t5 = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    FlaxT5EncoderModel.from_pretrained(tmp_path / "t5")


def test_old_configs_of_a_whole_clip() -> None:
    """Their text_config_dict counts, defaults included."""
    config = {"model_type": "clip", "text_config": {"hidden_size": 8}, "text_config_dict": CLIP, "projection_dim": 6}
    assert FlaxCLIPTextModel(config, _do_init=False).config.hidden_size == 16


def test_dtypes(pipeline: Path, tmp_path: Path) -> None:
    """Parameters keep the file's dtype, as upstream, and casts change those that the mask names."""
    model = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, model.params)
    half = model.to_bf16(model.params, mask)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half) if leaf.ndim == 2} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half) if leaf.ndim == 1} == {"float32"}
    model.save_pretrained(tmp_path / "half", params=model.to_fp16(model.params))
    again = FlaxCLIPTextModel.from_pretrained(tmp_path / "half")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again.params)} == {"float16"}
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"


def test_shards_and_mismatched_sizes(pipeline: Path, tmp_path: Path) -> None:
    model = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1
    again = FlaxCLIPTextModel.from_pretrained(tmp_path / "shards", vocab_size=50, ignore_mismatched_sizes=True)
    assert again.params["text_model"]["embeddings"]["token_embedding"]["embedding"].shape == (50, 16)
    layers = [m.params["text_model"]["encoder"] for m in (model, again)]
    jax.tree.map(np.testing.assert_array_equal, *layers)
    with pytest.raises(WeightsError, match="token_embedding"):
        FlaxCLIPTextModel.from_pretrained(tmp_path / "shards", vocab_size=50)


def test_gradient_checkpointing() -> None:
    model = FlaxT5EncoderModel({"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2})
    ids = np.array([[1, 2, 3]])

    def gradient() -> Any:
        return jax.jit(jax.grad(lambda params: model(ids, params=params)[0].sum()))(model.params)

    plain = gradient()
    model.enable_gradient_checkpointing()
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), gradient(), plain)


def test_mistakes(pipeline: Path) -> None:
    folder = pipeline / "text_encoder"
    with pytest.raises(ConfigError, match=r"knows no keyword 'subfoldr' .*did you mean 'subfolder'\?$"):
        FlaxCLIPTextModel.from_pretrained(folder, subfoldr="x")
    with pytest.raises(ConfigError, match=r"knows no keyword 'sed'.*did you mean 'seed'"):
        FlaxCLIPTextModel(CLIP, sed=1)
    with pytest.raises(ConfigError, match="knows no keyword 'from_flax'"):
        FlaxCLIPTextModel.from_pretrained(folder, from_flax=True)
    with pytest.raises(ConfigError, match="takes a config of model_type clip_text_model, this one is of t5"):
        FlaxCLIPTextModel(transformers.T5Config())
    with pytest.raises(ConfigError, match="takes a config of model_type t5, this one is of clip_text_model"):
        FlaxT5EncoderModel.from_pretrained(folder)
    with pytest.raises(ConfigError, match="the config is 3"):
        FlaxCLIPTextModel(3)
    model = FlaxCLIPTextModel(CLIP)
    with pytest.raises(WeightsError, match=r"the parameters are not of this FlaxCLIPTextModel.* more$"):
        model.params = FlaxCLIPTextModel(CLIP | {"hidden_size": 8}).params
    with pytest.raises(WeightsError, match="text_model/embeddings/position_embedding/embedding is missing"):
        model.params = {}
    with pytest.raises(ConfigError, match="max_shard_size is 'big'"):
        model.save_pretrained(pipeline / "new", max_shard_size="big")
    with pytest.raises(ConfigError, match="exceed max_position_embeddings=9"):
        model(np.zeros((1, 10), int))


def test_pickled_weights_are_not_read(pipeline: Path) -> None:
    folder = pipeline / "text_encoder"
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickled weights only"):
        FlaxCLIPTextModel.from_pretrained(folder, from_pt=True)
