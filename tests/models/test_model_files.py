"""Weight files: written for PyTorch, and read in every spelling that upstream's files have."""

import json
import re
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, CLIP, Case, random_params
from safetensors.torch import load_file, save_file

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.io.files import replacing, write_text
from flax_diffusion.models import FlaxAutoencoderKL, FlaxCLIPTextModel, FlaxUNet2DModel, weights

FILES = {"FlaxCLIPTextModel": "model.safetensors", "FlaxCLIPTextModelWithProjection": "model.safetensors"}


def saved(case: Case, folder: Path) -> tuple[Any, dict[str, Any]]:
    model = case.flax.from_config(case.config)
    params = random_params(model)
    model.save_pretrained(folder, params)
    return model, params


def rewrite(folder: Path, change: Any, name: str = "diffusion_pytorch_model.safetensors") -> None:
    """Apply `change` to a file's dictionary of tensors and write the result back."""
    tensors = load_file(folder / name)
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, folder / name, {"format": "pt"})


def assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, params = saved(case, tmp_path)
    reference, info = case.torch.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    stored = {key: value.numpy() for key, value in reference.state_dict().items()}
    prefix = "text_model." if isinstance(model, FlaxCLIPTextModel) else ""
    ours = dict(weights.to_torch(params))
    assert ours.keys() == {prefix + key for key in stored}
    for key, value in stored.items():
        np.testing.assert_array_equal(ours[prefix + key], value)

    again, reloaded = case.flax.from_pretrained(tmp_path)
    assert_equal(reloaded, params)
    assert again.config == model.config


def test_saved_config_is_upstreams(tmp_path: Path) -> None:
    for name, reference in (("sdxl", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("tutorial", "UNet2DModel")):
        case = CASES[name]
        ours = case.flax.from_config(case.config).saved_config({})
        theirs = json.loads(case.torch(**case.config).to_json_string())
        assert {key: value for key, value in ours.items() if key[0] != "_"} == {
            key: value for key, value in theirs.items() if key[0] != "_"
        }
        assert ours["_class_name"] == reference
    case = CASES["clip_projection"]
    saved(case, tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = case.torch.config_class(**case.config, architectures=["CLIPTextModelWithProjection"])
    assert ours.pop("dtype") == "float32"
    assert ours == {key: getattr(theirs, key) for key in ours}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_variant_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES["vae"]
    case.torch(**case.config).to(dtype).save_pretrained(tmp_path, variant="fp16")
    stored = load_file(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    for chosen, expected in ((None, jnp.dtype(str(dtype).removeprefix("torch."))), (np.float32, np.float32)):
        _, params = case.flax.from_pretrained(tmp_path, variant="fp16", param_dtype=chosen)
        for key, value in weights.to_torch(params):
            assert value.dtype == expected
            np.testing.assert_array_equal(value.astype(np.float32), stored[key].float().numpy())
    with pytest.raises(WeightsError, match="set variant"):
        case.flax.from_pretrained(tmp_path)


def test_sharded_files_of_diffusers(tmp_path: Path) -> None:
    case = CASES["sd1"]
    reference = case.torch(**case.config)
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    _, params = case.flax.from_pretrained(tmp_path)
    for key, value in weights.to_torch(params):
        np.testing.assert_array_equal(value, reference.state_dict()[key].numpy())
    next(tmp_path.glob("*-of-*.safetensors")).unlink()
    with pytest.raises(WeightsError, match="missing"):
        case.flax.from_pretrained(tmp_path)


def test_own_shards_replace_each_other(tmp_path: Path) -> None:
    case = CASES["sd1"]
    model, _ = saved(case, tmp_path)
    params = random_params(model, seed=1)
    model.save_pretrained(tmp_path, params, max_shard_bytes=20_000)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert_equal(case.flax.from_pretrained(tmp_path)[1], params)
    reference, info = case.torch.from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    np.testing.assert_array_equal(reference.conv_in.bias.detach().numpy(), params["conv_in"]["bias"])

    model.save_pretrained(tmp_path, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("name", ["vae", "ddpm"])
@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_attention_names(name: str, as_convolution: bool, tmp_path: Path) -> None:
    case = CASES[name]
    _, params = saved(case, tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for key, value in tensors.items():
            new = re.sub(r"attentions\.(\d)\.(to_[qkv]|to_out\.0)", lambda m: f"attentions.{m[1]}.{old[m[2]]}", key)
            renamed[new] = value[:, :, None, None] if new != key and value.ndim == 2 and as_convolution else value
        assert any("proj_attn" in key for key in renamed)
        return renamed

    rewrite(tmp_path, change)
    assert_equal(case.flax.from_pretrained(tmp_path)[1], params)


def test_clip_with_and_without_prefix_and_position_ids(tmp_path: Path) -> None:
    _, params = saved(CASES["clip"], tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {key.removeprefix("text_model."): value for key, value in tensors.items()}
        return bare | {"embeddings.position_ids": torch.arange(9)[None]}

    rewrite(tmp_path, change, "model.safetensors")
    assert_equal(FlaxCLIPTextModel.from_pretrained(tmp_path)[1], params)


@pytest.mark.parametrize("name", ["sd1", "vae", "clip"])
def test_flax_msgpack(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, params = saved(case, tmp_path)
    (tmp_path / FILES.get(case.flax.__name__, "diffusion_pytorch_model.safetensors")).unlink()
    flat = {}
    for path, value in flax.traverse_util.flatten_dict(params).items():
        joined = "/".join(path)  # upstream's Flax files: CLIP keeps a dict of layers, the VAE the old attention names
        joined = re.sub(r"layers_(\d)", r"layers/\1", joined) if name == "clip" else joined
        if name == "vae" and "attentions" in joined:
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out_0", "proj_attn")):
                joined = joined.replace(new, old)
        flat[tuple(joined.split("/"))] = value
    tree = flax.traverse_util.unflatten_dict(flat)
    file = "flax_model.msgpack" if name == "clip" else "diffusion_flax_model.msgpack"
    (tmp_path / file).write_bytes(flax.serialization.msgpack_serialize(tree))
    assert_equal(case.flax.from_pretrained(tmp_path)[1], params)


def test_all_misfits_in_one_error(tmp_path: Path) -> None:
    case = CASES["tutorial"]
    saved(case, tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["conv_in.bias"], tensors["conv_out.weight"]
        return tensors | {"extra.weight": torch.zeros(2, 3), "conv_in.weight": torch.zeros(8, 4, 3, 3)}

    rewrite(tmp_path, change)
    with pytest.raises(WeightsError) as error:
        case.flax.from_pretrained(tmp_path)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "missing conv_in.bias (8,)",
        "missing conv_out.weight (3, 8, 3, 3)",
        "unexpected extra.weight (2, 3)",
        "conv_in.weight has shape (8, 4, 3, 3) instead of (8, 3, 3, 3)",
    ):
        assert part in message


def test_pickles_are_refused(tmp_path: Path) -> None:
    case = CASES["vae"]
    case.torch(**case.config).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(WeightsError, match="pickled weights only"):
        case.flax.from_pretrained(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    saved(CASES["vae"], tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        FlaxAutoencoderKL.from_pretrained(tmp_path)


def test_missing_folder_subfolder_and_config(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="check the path"):
        FlaxUNet2DModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="no folder 'unet'"):
        FlaxUNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    with pytest.raises(WeightsError, match=r"config\.json does not exist"):
        FlaxUNet2DModel.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="neither a folder nor"):
        FlaxUNet2DModel.from_pretrained("nobody/no-such-model")


def test_another_models_parameters_are_not_saved(tmp_path: Path) -> None:
    model, params = saved(CASES["vae"], tmp_path)
    del params["quant_conv"]["bias"]
    with pytest.raises(WeightsError, match="quant_conv/bias: given nothing"):
        model.save_pretrained(tmp_path, params)


def test_bfloat16_parameters_are_written_as_such(tmp_path: Path) -> None:
    case = CASES["vae"]
    model = case.flax.from_config(case.config)
    params = jax.tree.map(lambda value: jnp.asarray(value, jnp.bfloat16), random_params(model))
    model.save_pretrained(tmp_path, params)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert_equal(case.flax.from_pretrained(tmp_path)[1], jax.tree.map(lambda value: np.float32(value), params))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["value"]


BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tutorial", {"norm_num_group": 4}, "did you mean 'norm_num_groups'"),
        ("tutorial", {"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "'SkipDownBlock2D' in down_block_types"),
        ("tutorial", {"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ("tutorial", {"time_embedding_type": "learned"}, "needs num_train_timesteps, which is None: set it to the"),
        ("tutorial", {"up_block_types": ("UpBlock2D",)}, "up_block_types has 1 entries"),
        ("tutorial", {"norm_num_groups": 3}, "norm_num_groups=3"),
        ("tutorial", {"norm_num_groups": "4"}, "norm_num_groups is '4'; it must be a valid integer"),
        ("tutorial", dict.fromkeys(BLOCKS, ()), "block_out_channels is empty"),
        ("tutorial", {"_class_name": "UNet2DConditionModel"}, "the config is of a UNet2DConditionModel"),
        ("sd1", {"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ("sd1", {"attention_type": "gated"}, "attention_type='gated'"),
        ("sd1", {"num_attention_heads": 0}, "attention_head_dim is 0"),
        ("sd1", {"attention_head_dim": (2, 2, 2)}, "attention_head_dim"),
        ("sd1", {"class_embed_type": "projection"}, "projection_class_embeddings_input_dim, which is None: set it to"),
        ("sd1", {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}, "set both, they are 4 and None"),
        ("sd1", {"encoder_hid_dim_type": "text_proj"}, "needs encoder_hid_dim, which is None: set it to the width"),
        ("sd1", {"encoder_hid_dim": 3, "cross_attention_dim": (12, 12)}, "give one number in place of [12, 12]"),
        ("sd1", {"transformer_layers_per_block": ((1, 1), 1)}, "reverse_transformer_layers_per_block"),
        ("vae", {"down_block_types": ("AttnDownEncoderBlock2D",) * 2}, "AttnDownEncoderBlock2D"),
        ("clip", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ("clip", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("clip", {"eos_token_id": [2, 3]}, "eos_token_id is (2, 3); it must be a valid integer"),
        ("clip", {"num_attention_heads": 3}, "hidden_size=16 must be a multiple of num_attention_heads=3: change one"),
    ],
)
def test_config_errors(name: str, change: dict[str, Any], message: str) -> None:
    case = CASES[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        case.flax.from_config(case.config | change)


def test_published_configs_metadata_is_accepted() -> None:
    FlaxCLIPTextModel.from_config(
        CLIP | {"_name_or_path": "x", "architectures": ["CLIPTextModel"], "torch_dtype": "float32", "dropout": 0.0}
    )
    FlaxUNet2DModel.from_config(CASES["tutorial"].config | {"_class_name": "UNet2DModel", "_diffusers_version": "0.2"})
