"""The pipelines as code written for Diffusers 0.39 calls them, and equal to PyTorch's on the same noise."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from PIL import Image

from flax_diffusion import (
    FlaxDDIMScheduler,
    FlaxDiffusionPipeline,
    FlaxDPMSolverMultistepScheduler,
    FlaxLMSDiscreteScheduler,
    FlaxStableDiffusionControlNetPipeline,
    FlaxStableDiffusionImg2ImgPipeline,
    FlaxStableDiffusionInpaintPipeline,
    FlaxStableDiffusionPipeline,
    FlaxStableDiffusionXLPipeline,
)
from flax_diffusion.core.data.captions import train_tokenizer
from flax_diffusion.core.errors import ConfigError, DataError, UserError, WeightsError

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
KEY = jax.random.PRNGKey(0)


def text_config(tokenizer: Any, **changes: Any) -> transformers.CLIPTextConfig:
    """A tiny text encoder for a tokenizer."""
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=10,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )


def parts(**unet: Any) -> dict[str, Any]:
    """The parts of a PyTorch pipeline, with random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red cat", "a blue dog"], 520, 9)
    return {
        "vae": diffusers.AutoencoderKL(**VAE),
        "text_encoder": transformers.CLIPTextModel(text_config(tokenizer)),
        "tokenizer": tokenizer,
        "unet": diffusers.UNet2DConditionModel(**UNET | unet),
        "scheduler": diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
    }


NONE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline that PyTorch saved."""
    folder = tmp_path_factory.mktemp("sd")
    diffusers.StableDiffusionPipeline(**parts(), **NONE).save_pretrained(folder)
    return folder


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def as_torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def assert_same_picture(ours: Any, theirs: np.ndarray) -> None:
    """Half a step of 8 bits is what two float32 computations may differ by here."""
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() < 0.5 / 255


def test_text_to_image_equals_pytorch(folder: Path) -> None:
    pipe, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    prompts = ["a red cat", "a blue dog"]
    ids = pipe.prepare_inputs(prompts)
    latents = jax.random.normal(KEY, (2, 4, 8, 12))
    ours = pipe(ids, params, KEY, 5, height=16, width=24, neg_prompt_ids=pipe.prepare_inputs(["dog", "cat"])).images
    given = pipe(ids, params, KEY, 5, 16, 24, 7.5, latents, pipe.prepare_inputs(["dog", "cat"]), False)[0]
    np.testing.assert_array_equal(ours, given)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompts,
        negative_prompt=["dog", "cat"],
        num_inference_steps=5,
        height=16,
        width=24,
        latents=as_torch(latents),
        output_type="np",
    ).images
    assert_same_picture(ours, expected)
    assert [image.size for image in pipe.numpy_to_pil(ours)] == [(24, 16)] * 2


@pytest.mark.acceptance
def test_the_calls_of_a_notebook(folder: Path) -> None:
    """Replicated parameters and sharded prompts, on as many devices as there are."""
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(
        str(folder), revision=None, dtype=jnp.float32, safety_checker=None, from_pt=True, split_head_dim=True
    )
    count = jax.device_count()
    prompt_ids = pipeline.prepare_inputs(count * ["a red cat"])
    keys = jax.random.split(KEY, count)
    images = pipeline(shard(prompt_ids), replicate(params), keys, num_inference_steps=3, jit=True).images
    assert images.shape == (count, 1, 16, 16, 3)
    pictures = pipeline.numpy_to_pil(np.asarray(images.reshape((count,) + images.shape[-3:])))
    assert len(pictures) == count
    alone = pipeline(prompt_ids[:1], params, keys[0], num_inference_steps=3).images
    np.testing.assert_allclose(images[0], alone, atol=1e-5)
    whole = pipeline(prompt_ids, params, KEY, num_inference_steps=3, jit=True).images
    np.testing.assert_allclose(whole, pipeline(prompt_ids, params, KEY, num_inference_steps=3).images, atol=1e-5)


def test_another_scheduler(folder: Path) -> None:
    """DPM-Solver and LMS in place of the folder's, batches over one, guidance by picture."""
    for cls in (FlaxDPMSolverMultistepScheduler, FlaxLMSDiscreteScheduler):
        scheduler, state = cls.from_pretrained(str(folder), subfolder="scheduler")
        pipe, params = FlaxStableDiffusionPipeline.from_pretrained(folder, scheduler=scheduler)
        params["scheduler"] = state
        ids = pipe.prepare_inputs(["a red cat", "a blue dog"])
        both = pipe(ids, params, KEY, 4, guidance_scale=jnp.array([1.0, 5.0])).images
        one = pipe(ids, params, KEY, 4, guidance_scale=5.0).images
        assert np.isfinite(both).all()
        np.testing.assert_allclose(both[1], one[1], atol=1e-5)
        assert not np.allclose(both[0], one[0], atol=1e-4)
        pipe.scheduler, params["scheduler"] = FlaxDDIMScheduler(), FlaxDDIMScheduler().create_state()
        assert not np.allclose(pipe(ids, params, KEY, 4, guidance_scale=5.0).images, one, atol=1e-4)


def test_image_to_image_equals_pytorch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(folder)
    ids, pixels = pipe.prepare_inputs("a red cat", picture(40, 36))
    assert pixels.shape == (1, 3, 32, 32)
    latents = jax.random.normal(KEY, (1, 4, 16, 16))
    ours = pipe(ids, pixels, params, KEY, strength=0.6, num_inference_steps=5).images
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    noises = [as_torch(jax.random.normal(KEY, (1, 16, 16, 4))).permute(0, 3, 1, 2), as_torch(latents)]
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: noises[0])
    monkeypatch.setattr(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img.randn_tensor",
        lambda *_, **__: noises[1],
    )
    expected = theirs(
        "a red cat", as_torch(pixels / 2 + 0.5), strength=0.6, num_inference_steps=5, output_type="np"
    ).images
    assert_same_picture(ours, expected)
    untouched = pipe(ids, pixels, params, KEY, strength=0.0, num_inference_steps=5).images
    assert untouched.shape == (1, 32, 32, 3)


def test_inpainting_equals_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers.StableDiffusionInpaintPipeline(**parts(in_channels=9), **NONE).save_pretrained(tmp_path)
    pipe, params = FlaxStableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    mask = Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8))
    ids, masked, masks = pipe.prepare_inputs("a red cat", picture(), mask)
    assert masks.shape == (1, 1, 32, 32)
    assert float(masks.mean()) == 0.25
    assert not (masked * masks).any()
    ours = pipe(ids, masks, masked, params, KEY, 5, height=32, width=32).images
    theirs = diffusers.StableDiffusionInpaintPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    _, second = jax.random.split(KEY)
    noise = as_torch(jax.random.normal(second, (1, 16, 16, 4))).permute(0, 3, 1, 2)
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: noise)
    expected = theirs(
        "a red cat",
        picture(),
        mask,
        height=32,
        width=32,
        strength=1.0,
        num_inference_steps=5,
        latents=as_torch(jax.random.normal(KEY, (1, 4, 16, 16))),
        output_type="np",
    ).images
    assert_same_picture(ours, expected)


def test_a_control_net_equals_pytorch(tmp_path: Path) -> None:
    made = parts()
    controlnet = diffusers.ControlNetModel.from_unet(made["unet"], conditioning_embedding_out_channels=(4, 8))
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    diffusers.StableDiffusionControlNetPipeline(**made, controlnet=controlnet, **NONE).save_pretrained(tmp_path)
    pipe, params = FlaxStableDiffusionControlNetPipeline.from_pretrained(tmp_path)
    ids, control = pipe.prepare_text_inputs(["a red cat"]), pipe.prepare_image_inputs(picture(70, 64))
    assert control.shape == (1, 3, 64, 64)
    ours = pipe(ids, control, params, KEY, 4, controlnet_conditioning_scale=0.7).images
    theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red cat",
        as_torch(control),
        num_inference_steps=4,
        controlnet_conditioning_scale=0.7,
        latents=as_torch(jax.random.normal(KEY, (1, 4, 32, 32))),
        output_type="np",
    ).images
    assert_same_picture(ours, expected)
    found, _ = FlaxDiffusionPipeline.from_pretrained(tmp_path)
    assert type(found) is FlaxStableDiffusionControlNetPipeline


def test_sdxl_equals_pytorch(tmp_path: Path) -> None:
    made = parts(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
        use_linear_projection=True,
    )
    second = transformers.CLIPTextModelWithProjection(text_config(made["tokenizer"], hidden_act="gelu"))
    both = {"text_encoder_2": second, "tokenizer_2": made["tokenizer"]}
    diffusers.StableDiffusionXLPipeline(**made, **both, add_watermarker=False).save_pretrained(tmp_path)
    pipe, params = FlaxStableDiffusionXLPipeline.from_pretrained(tmp_path)
    ids = pipe.prepare_inputs(["a red cat", "a blue dog"])
    assert ids.shape == (2, 2, 9)
    states, embeds = pipe.get_embeddings(ids, params)
    assert (states.shape, embeds.shape) == ((2, 9, 32), (2, 10))
    ours = pipe(ids, params, KEY, 4, 5.0).images
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    latents = as_torch(jax.random.normal(KEY, (2, 4, 8, 8)))
    expected = theirs(
        ["a red cat", "a blue dog"], num_inference_steps=4, guidance_scale=5.0, latents=latents, output_type="np"
    ).images
    assert_same_picture(ours, expected)
    assert pipe(ids, params, KEY, 1, output_type="latent").images.shape == (2, 4, 8, 8)


def test_a_safety_checker_blackens(tmp_path: Path) -> None:
    made = parts()
    tokenizer = made["tokenizer"]
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=text_config(tokenizer).to_dict(),
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        projection_dim=10,
    )
    checker = diffusers.pipelines.stable_diffusion.safety_checker.StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-10.0)  # every picture is above a threshold of −10
    size = {"height": 16, "width": 16}
    extractor = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
    diffusers.StableDiffusionPipeline(**made, safety_checker=checker, feature_extractor=extractor).save_pretrained(
        tmp_path
    )
    pipe, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path)
    ids = pipe.prepare_inputs(["a red cat", "a blue dog"])
    with pytest.warns(UserWarning, match="flagged 2 of 2 pictures"):
        output = pipe(ids, params, KEY, 1)
    assert output.nsfw_content_detected == [True, True]
    assert not output.images.any()
    safe = FlaxStableDiffusionPipeline(**pipe.components | {"safety_checker": None})
    assert safe(ids, params, KEY, 1).images.any()
    pipe.save_pretrained(tmp_path / "again", params)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again.safety_checker) is type(checker)


def test_saving_is_for_pytorch(folder: Path, tmp_path: Path) -> None:
    pipe, params = FlaxDiffusionPipeline.from_pretrained(folder, dtype=jnp.bfloat16)
    assert type(pipe) is FlaxStableDiffusionPipeline
    assert (pipe.dtype, pipe.unet.dtype, pipe.vae.dtype) == (jnp.bfloat16,) * 3
    pipe.save_pretrained(str(tmp_path), params=params)
    theirs, before = (diffusers.StableDiffusionPipeline.from_pretrained(path) for path in (tmp_path, folder))
    for name in ("unet", "vae", "text_encoder"):
        ours, original = getattr(theirs, name).state_dict(), getattr(before, name).state_dict()
        assert ours.keys() == original.keys()
        assert all(torch.equal(ours[key], original[key]) for key in ours)
    again, same = FlaxStableDiffusionPipeline.from_pretrained(tmp_path)
    assert again.config == pipe.config
    jax.tree.map(np.testing.assert_array_equal, same["unet"], params["unet"])


def test_progress_bars_and_components(folder: Path) -> None:
    pipe, _ = FlaxStableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    other = FlaxStableDiffusionImg2ImgPipeline(**pipe.components)
    assert other.unet is pipe.unet
    assert "unet=FlaxUNet2DConditionModel" in repr(pipe)


@functools.cache
def made(folder: Path) -> tuple[Any, Any, Any]:
    pipe, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    return pipe, params, pipe.prepare_inputs(["a red cat"])


BAD: dict[str, tuple[Any, type[UserError], str]] = {
    "keyword": (lambda f: FlaxStableDiffusionPipeline.from_pretrained(f, safety_cheker=None), ConfigError,
                "'safety_cheker'.* mean 'safety_checker'"),
    "class": (lambda f: FlaxStableDiffusionXLPipeline.from_pretrained(f), WeightsError,
              "is a StableDiffusionPipeline, not a StableDiffusionXLPipeline"),
    "part": (lambda f: FlaxStableDiffusionControlNetPipeline.from_pretrained(f), WeightsError,
             "has no controlnet: pass controlnet="),
    "prompt": (lambda f: made(f)[0].prepare_inputs(3), ConfigError, "prompt is int: give a string"),
    "size": (lambda f: made(f)[0](made(f)[2], made(f)[1], KEY, 1, height=15), ConfigError, "multiples of 2"),
    "ids": (lambda f: made(f)[0](made(f)[2][0], made(f)[1], KEY, 1), ConfigError, "give what prepare_inputs"),
    "sharded": (lambda f: made(f)[0](made(f)[2][None], made(f)[1], KEY, 1), ConfigError, "pass jit=True"),
    "devices": (lambda f: made(f)[0](np.zeros((99, 1, 9), int), made(f)[1], KEY, 1, jit=True), ConfigError,
                "for 99 devices"),
    "key": (lambda f: made(f)[0](made(f)[2][None], made(f)[1], KEY, 1, jit=True), ConfigError,
            r"one for each of 1 devices: jax.random.split\(key, 1\)"),
    "keys": (lambda f: made(f)[0](made(f)[2], made(f)[1], KEY[None], 1), ConfigError, "one key for the whole batch"),
    "latents": (lambda f: made(f)[0](made(f)[2], made(f)[1], KEY, 1, latents=jnp.zeros((1, 4, 4, 4))), ConfigError,
                r"latents have shape \(1, 4, 4, 4\), and these pictures need \(1, 4, 8, 8\)"),
    "negative": (lambda f: made(f)[0](made(f)[2], made(f)[1], KEY, 1, neg_prompt_ids=np.zeros((2, 9), int)),
                 ConfigError, "neg_prompt_ids has shape"),
    "guidance": (lambda f: made(f)[0](made(f)[2], made(f)[1], KEY, 1, guidance_scale=[1.0, 2.0]), ConfigError,
                 "guidance_scale has 2 values"),
    "missing": (lambda f: made(f)[0](made(f)[2], {"unet": {}}, KEY, 1), WeightsError,
                "params has no text_encoder, vae"),
    "others": (lambda f: made(f)[0](made(f)[2], made(f)[1] | {"unet": made(f)[1]["vae"]}, KEY, 1), WeightsError,
               "params are not those of this pipeline's models"),
    "replicated": (lambda f: made(f)[0](made(f)[2], replicate(made(f)[1]), KEY, 1), ConfigError, "replicate both"),
    "picture": (lambda f: FlaxStableDiffusionImg2ImgPipeline.from_pretrained(f)[0].prepare_inputs("a", "b"), DataError,
                "image is str: give a Pillow picture"),
    "small": (lambda f: FlaxStableDiffusionImg2ImgPipeline.from_pretrained(f)[0].prepare_inputs("a", picture(8, 40)),
              DataError, "picture of 8x40: its sides must be 32 or more"),
    "several": (lambda f: FlaxStableDiffusionImg2ImgPipeline.from_pretrained(f)[0].prepare_inputs(
        "a", [picture(32, 64), picture()]), DataError, "several sizes"),
    "strength": (lambda f: FlaxStableDiffusionImg2ImgPipeline.get_timestep_start(10, 1.5), ConfigError, "from 0"),
    "mask": (lambda f: FlaxStableDiffusionInpaintPipeline.from_pretrained(f)[0].prepare_inputs(
        "a", picture(64, 32), picture()), DataError, "image is 64x32 and mask 32x32"),
    "channels": (lambda f: FlaxStableDiffusionInpaintPipeline.from_pretrained(f)[0](
        np.zeros((1, 9), int), jnp.zeros((1, 1, 16, 16)), jnp.zeros((1, 3, 16, 16)), {}, KEY), ConfigError,
        "the UNet has 4 input channels, and one that inpaints has 9"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, folder: Path) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=words) as caught:
        call(folder)
    assert "\n" not in str(caught.value)


def test_prompts_that_do_not_divide_over_the_devices(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    pipe, params, ids = made(folder)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices() * 2)
    with pytest.raises(ConfigError, match="1 prompts do not divide over"):
        pipe(ids, params, KEY, 1, jit=True)
