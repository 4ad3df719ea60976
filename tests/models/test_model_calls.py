"""The models as code written for Diffusers 0.39 calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, CONDITION, VAE, random_params
from flax.core import freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny import UNET

from flax_diffusion import (
    FlaxAutoencoderKL,
    FlaxControlNetModel,
    FlaxModelMixin,
    FlaxUNet2DConditionModel,
    FlaxUNet2DModel,
)
from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.io import publishing
from flax_diffusion.models import modeling, vae_flax


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a pipeline's autoencoder and UNet, as PyTorch's classes save them."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    diffusers.UNet2DConditionModel(**CONDITION).save_pretrained(folder / "unet")
    return folder


def test_latents_for_a_cache(folder: Path) -> None:
    """A script that caches latents: PyTorch's weights, channels last, one key."""
    vae, params = FlaxAutoencoderKL.from_pretrained(str(folder), subfolder="vae", from_pt=True, dtype=jnp.float32)
    pixels = jnp.linspace(-1, 1, 2 * 3 * 16 * 24).reshape(2, 3, 16, 24)
    outputs = vae.apply({"params": params}, pixels, deterministic=True, method=vae.encode)
    latents = outputs.latent_dist.sample(jax.random.PRNGKey(0)) * vae.config.scaling_factor
    assert latents.shape == (2, 8, 12, 4)
    moments = jnp.concatenate([outputs.latent_dist.mean, outputs.latent_dist.logvar], axis=-1)
    mean, _ = jnp.split(moments, 2, axis=-1)
    np.testing.assert_array_equal(mean, outputs.latent_dist.mode())


def test_decoding_takes_both_layouts(folder: Path) -> None:
    vae, params = FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True)
    latents = jax.random.normal(jax.random.PRNGKey(1), (2, 8, 6, 4))
    images = vae.apply({"params": params}, latents, method=vae.decode).sample
    again = vae.apply({"params": params}, jnp.transpose(latents, (0, 3, 1, 2)), method=vae.decode).sample
    assert images.shape == (2, 3, 16, 12)
    np.testing.assert_array_equal(images, again)
    square = jax.random.normal(jax.random.PRNGKey(1), (1, 4, 4, 4))  # both layouts fit: channels last, as upstream
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(np.array(square).transpose(0, 3, 1, 2).copy())).sample
    made = vae.apply({"params": params}, square, method=vae.decode).sample
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


def test_sampled_reconstruction(folder: Path) -> None:
    vae, params = FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae")
    pixels, key = jnp.zeros((1, 3, 16, 16)), jax.random.PRNGKey(3)
    sampled = vae.apply({"params": params}, pixels, sample_posterior=True, rngs={"gaussian": key}).sample
    mean = vae.apply({"params": params}, pixels, return_dict=False)[0]
    assert sampled.shape == mean.shape
    assert not np.array_equal(sampled, mean)


def test_casts_and_masks(folder: Path) -> None:
    unet, params = FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(unet.to_bf16(params))} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(unet.to_fp32(unet.to_fp16(freeze(params))))} == {np.dtype("float32")}
    mask = unflatten_dict({path: path[-1] != "bias" for path in flatten_dict(params)})
    for path, leaf in flatten_dict(unet.to_fp16(params, mask)).items():
        assert leaf.dtype == (np.float32 if path[-1] == "bias" else np.float16)
    with pytest.raises(ConfigError, match="the mask and the parameters differ at conv_in/bias"):
        unet.to_fp16(params, {name: part for name, part in mask.items() if name != "conv_in"})


def test_a_model_of_a_config(folder: Path) -> None:
    config = FlaxUNet2DConditionModel.load_config(folder, subfolder="unet", cache_dir="/nowhere")
    unet, unused = FlaxUNet2DConditionModel.from_config(
        config, dtype=jnp.bfloat16, return_unused_kwargs=True, use_memory_efficient_attention=True, other=1
    )
    assert isinstance(unet, FlaxModelMixin)
    assert unet.dtype == jnp.bfloat16
    assert unused == {"other": 1}
    params = unet.init_weights(rng=jax.random.PRNGKey(0))
    assert params["conv_in"]["kernel"].shape == (3, 3, 4, 8)
    assert unet.config.block_out_channels == [8, 16]
    assert unet.config["in_channels"] == 4


def test_heads_by_their_other_name() -> None:
    changed = {**CASES["sd1"].config, "num_attention_heads": 4, "split_head_dim": True}
    unet = FlaxUNet2DConditionModel(**changed)
    assert unet.config.attention_head_dim == 4
    assert unet.config.num_attention_heads is None
    diffusers.UNet2DConditionModel(**unet.config)


def test_a_control_net_starts_from_the_unet(folder: Path) -> None:
    """As its training script does, block by block; at first it adds nothing."""
    unet, unet_params = FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="unet", from_pt=True)
    controlnet = FlaxControlNetModel(
        in_channels=unet.config.in_channels,
        down_block_types=unet.config.down_block_types,
        only_cross_attention=unet.config.only_cross_attention,
        block_out_channels=unet.config.block_out_channels,
        layers_per_block=unet.config.layers_per_block,
        attention_head_dim=unet.config.attention_head_dim,
        cross_attention_dim=unet.config.cross_attention_dim,
        use_linear_projection=unet.config.use_linear_projection,
        flip_sin_to_cos=unet.config.flip_sin_to_cos,
        freq_shift=unet.config.freq_shift,
        conditioning_embedding_out_channels=(4, 8),
        norm_num_groups=4,
        sample_size=8,
        dropout=0.0,
    )
    params = unfreeze(controlnet.init_weights(rng=jax.random.PRNGKey(2)))
    for name in ("conv_in", "time_embedding", "down_blocks_0", "down_blocks_1", "mid_block"):
        params[name] = unet_params[name]
    same, made = FlaxControlNetModel.from_unet(
        unet, unet_params, rng=jax.random.PRNGKey(2), conditioning_embedding_out_channels=(4, 8)
    )
    assert same.config == controlnet.config
    jax.tree.map(np.testing.assert_array_equal, params, made)

    key = jax.random.PRNGKey(3)
    sample, picture = jax.random.normal(key, (2, 4, 8, 8)), jax.random.uniform(key, (2, 3, 16, 16))
    states, t = jax.random.normal(key, (2, 5, 12)), jnp.array([7, 900])
    down, mid = controlnet.apply({"params": params}, sample, t, states, picture, train=True, return_dict=False)
    assert not mid.any()
    assert not any(part.any() for part in down)
    plain = unet.apply({"params": unet_params}, sample, t, states).sample
    steered = unet.apply(
        {"params": unet_params},
        sample,
        t,
        states,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    np.testing.assert_array_equal(plain, steered)


def test_first_weights_under_jit() -> None:
    """As scripts shard them: shapes by `eval_shape`, then a jitted `init_weights`."""
    vae, key = FlaxAutoencoderKL(**VAE), jax.random.PRNGKey(4)
    plain, jitted = vae.init_weights(key), jax.jit(vae.init_weights)(key)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(jitted))
    jax.tree.map(np.testing.assert_array_equal, plain, jitted)
    shapes = jax.eval_shape(vae.init_weights, key)
    jax.tree.map(
        lambda shape, leaf: np.testing.assert_equal((shape.shape, shape.dtype), (leaf.shape, leaf.dtype)), shapes, plain
    )
    several = jax.vmap(vae.init_weights)(jax.random.split(key, 2))
    assert several["encoder"]["conv_in"]["kernel"].shape[0] == 2


def test_fields_of_the_flax_classes_can_be_read_from_the_config(tmp_path: Path) -> None:
    controlnet = FlaxControlNetModel(**CASES["control"].config, sample_size=16, dropout=0.1)
    assert (controlnet.config.sample_size, controlnet.config["dropout"]) == (16, 0.1)
    assert not {"sample_size", "dropout"} & {*controlnet.config, *controlnet.saved_config({})}
    controlnet.to_json_file(tmp_path / "any.json")
    assert json.loads((tmp_path / "any.json").read_text()) == json.loads(controlnet.to_json_string())
    assert json.loads(controlnet.to_json_string()) == controlnet.saved_config({})
    with pytest.raises(AttributeError, match="the config has no field 'nothing'"):
        _ = controlnet.config.nothing


def test_a_control_net_of_another_size() -> None:
    case = CASES["control"]
    model = case.flax(**case.config)
    inputs = [jnp.zeros(shape) for shape in ((2, 4, 8, 8), (2,), (2, 5, 12), (2, 3, 64, 64))]
    with pytest.raises(ConfigError, match=r"has shape \(2, 3, 64, 64\), and latents .* need \(2, 3, 16, 16\)"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cach_dir": "x"}, "'cach_dir' .*did you mean 'cache_dir'"),
        ({"act_fun": "silu"}, "did you mean 'act_fn'"),
        ({"use_safetensors": False}, "does not read pickled weights"),
    ],
)
def test_wrong_keywords(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae", **options)


def test_keywords_that_nothing_reads(folder: Path) -> None:
    with pytest.warns(UserWarning, match="proxies from HTTPS_PROXY"):
        FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae", proxies={"https": "host:1"})
    FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae", proxies=None, resume_download=False)


def test_a_folder_of_another_class(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the config is of a AutoencoderKL, not of a UNet2DConditionModel"):
        FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="vae")


def test_only_flax_files_where_pytorchs_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_flax_model.msgpack").write_bytes(b"")
    with pytest.raises(WeightsError, match="leave them out"):
        FlaxAutoencoderKL.from_pretrained(tmp_path, from_pt=True)


def test_how_files_come_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    FlaxAutoencoderKL.from_pretrained(
        "owner/name", subfolder="vae", revision="flax", cache_dir=tmp_path, force_download=True, use_auth_token="t"
    )
    (name, options), *_ = asked
    assert name == "owner/name"
    assert options["revision"] == "flax"
    assert "vae/config.json" in options["allow_patterns"]
    assert options["cache_dir"] == tmp_path
    assert (options["force_download"], options["token"]) == (True, "t")
    assert "local_files_only" not in options


def test_saving_and_pushing(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vae, params = FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae")
    vae.save_pretrained(tmp_path / "other", params, is_main_process=False)
    assert not (tmp_path / "other").exists()
    pushed = []
    monkeypatch.setattr(publishing, "push_folder", lambda *args, **options: pushed.append((args, options)))
    vae.save_pretrained(str(tmp_path / "mine"), params=params, push_to_hub=True, token="t")
    ((where, repository), options), *_ = pushed
    assert (where, repository, options["token"]) == (tmp_path / "mine", "mine", "t")
    again, same = FlaxAutoencoderKL.from_pretrained(tmp_path / "mine")
    assert again == vae
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_a_push_that_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(WeightsError, match=r"cannot push .* to mine/model \(no route to host\)"):
        publishing.push_folder(tmp_path, "mine/model", token="t")


def test_random_parameters_have_the_models_tree() -> None:
    case = CASES["control"]
    model = case.flax(**case.config)
    drawn = model.init_weights(0)
    assert jax.tree.structure(drawn) == jax.tree.structure(random_params(model))
    zero = {path[0] for path, leaf in flatten_dict(drawn).items() if path[-1] == "kernel" and not leaf.any()}
    assert zero >= {"controlnet_mid_block", "controlnet_down_blocks_0"}
    assert "conv_in" not in zero


def test_parts_of_the_autoencoder(folder: Path) -> None:
    """Code that builds its own autoencoder of Diffusers' blocks gets the whole one's numbers and names."""
    vae, params = FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae")
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    encoder = vae_flax.FlaxEncoder(
        out_channels=4, down_block_types=("DownEncoderBlock2D",) * 2, double_z=True, **blocks
    )
    images = jax.random.normal(jax.random.PRNGKey(0), (1, 16, 16, 3))
    drawn = encoder.init(jax.random.PRNGKey(1), images)["params"]
    assert jax.tree.structure(drawn) == jax.tree.structure(params["encoder"])
    made = encoder.apply({"params": params["encoder"]}, images)
    whole = vae.apply({"params": params}, images, method=lambda module, x: module.encoder(x, True))
    np.testing.assert_array_equal(made, whole)
    decoder = vae_flax.FlaxDecoder(in_channels=4, up_block_types=("UpDecoderBlock2D",) * 2, **blocks)
    assert decoder.apply({"params": params["decoder"]}, images[:, :8, :8, :1].repeat(4, -1)).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (vae_flax.FlaxUpsample2D(8), (1, 8, 8, 8)),
        (vae_flax.FlaxDownsample2D(8), (1, 2, 2, 8)),
        (vae_flax.FlaxResnetBlock2D(8, 12, groups=4), (1, 4, 4, 12)),
        (vae_flax.FlaxAttentionBlock(8, num_groups=4), (1, 4, 4, 8)),
        (vae_flax.FlaxDownEncoderBlock2D(8, 16, resnet_groups=4), (1, 2, 2, 16)),
        (vae_flax.FlaxUpDecoderBlock2D(8, 4, resnet_groups=4), (1, 8, 8, 4)),
        (vae_flax.FlaxUNetMidBlock2D(8, resnet_groups=None, num_attention_heads=None), (1, 4, 4, 8)),
    ],
)
def test_blocks_of_the_autoencoder(module: Any, shape: tuple[int, ...]) -> None:
    made = jax.eval_shape(lambda: module.init_with_output(jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 8)))[0])
    assert made.shape == shape


def test_a_shortcut_that_the_channels_do_not_ask_for() -> None:
    block = vae_flax.FlaxResnetBlock2D(8, 8, groups=4, use_nin_shortcut=True)
    with pytest.raises(ConfigError, match="use_nin_shortcut=True with 8 channels in and 8 out"):
        jax.eval_shape(lambda: block.init(jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 8))))


@pytest.mark.parametrize("types", [("AttnDownEncoderBlock2D",), ("DownEncoderBlock2D",) * 2])
def test_block_types_that_the_autoencoder_has_not(types: tuple[str, ...]) -> None:
    encoder = vae_flax.FlaxEncoder(down_block_types=types, norm_num_groups=4)
    with pytest.raises(ConfigError, match=r"down_block_types=.* give 'DownEncoderBlock2D' once for each"):
        jax.eval_shape(lambda: encoder.init(jax.random.PRNGKey(0), jnp.zeros((1, 4, 4, 3))))


def test_shapes_of_parameters_are_traced_once() -> None:
    """Models of one config that run in different ways have the same, each caller has its own tree."""
    model = FlaxUNet2DModel.from_config(UNET)
    shapes = model.params_shape()
    traced = modeling._params_shape.cache_info().misses
    del shapes["conv_in"]
    again = FlaxUNet2DModel.from_config(UNET, dtype=jnp.bfloat16, gradient_checkpointing=True).params_shape()
    assert again["conv_in"]["kernel"].shape == (3, 3, 1, 8)
    assert modeling._params_shape.cache_info().misses == traced
    wider = FlaxUNet2DModel.from_config(UNET | {"block_out_channels": [16, 16]}).params_shape()
    assert wider["conv_in"]["kernel"].shape == (3, 3, 1, 16)


def test_shapes_of_parameters_have_the_dtypes_that_jax_has() -> None:
    def dtypes(dtype: Any) -> set[Any]:
        shapes = FlaxUNet2DModel.from_config(UNET, param_dtype=dtype).params_shape()
        return {leaf.dtype for leaf in jax.tree.leaves(shapes)}

    assert dtypes(jnp.bfloat16) == {jnp.dtype(jnp.bfloat16)}
    assert dtypes(jnp.float32) == {jnp.dtype(jnp.float32)}
    with jax.enable_x64(True):
        assert dtypes(jnp.float64) == {jnp.dtype(jnp.float64)}
