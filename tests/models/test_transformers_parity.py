"""The models with Transformers' face equal PyTorch's, in float32 and in float64."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import CLIP
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

import flax_diffusion

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
T5 = {
    "vocab_size": 20,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
IDS = np.array([[38, 4, 17, 39, 39, 39], [38, 5, 6, 7, 8, 39]])
MASK = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
LONG_IDS = np.random.default_rng(0).integers(0, 20, (2, 17))
LONG_MASK = (np.arange(17) < np.array([[10], [17]])).astype(int)


def clip_config(**text: Any) -> transformers.CLIPConfig:
    return transformers.CLIPConfig(text_config=CLIP | text, vision_config=VISION, projection_dim=6)


def t5_config(**changes: Any) -> transformers.T5Config:
    return transformers.T5Config(**T5, **changes)


CASES = {
    "text": ("CLIPTextModel", clip_config().text_config, {"input_ids": IDS}),
    "text_old_eos": (
        "CLIPTextModel", clip_config(eos_token_id=2).text_config, {"input_ids": IDS, "attention_mask": MASK}
    ),
    "text_projection": (
        "CLIPTextModelWithProjection", clip_config(hidden_act="gelu").text_config,
        {"input_ids": IDS, "position_ids": np.array([[0, 1, 2, 3, 4, 8]] * 2)},
    ),
    "vision": ("CLIPVisionModel", clip_config().vision_config, {"pixel_values": PIXELS}),
    "clip": ("CLIPModel", clip_config(), {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK}),
    "t5_relu": ("T5EncoderModel", t5_config(), {"input_ids": LONG_IDS, "attention_mask": LONG_MASK}),
    "t5_gated_gelu": ("T5EncoderModel", t5_config(feed_forward_proj="gated-gelu"), {"input_ids": LONG_IDS}),
}  # fmt: skip


def random_model(kind: Any, config: Any, attention: str = "eager") -> Any:
    """Build a PyTorch model, every parameter random."""
    torch.manual_seed(0)
    config._attn_implementation = attention
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def to_torch(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def flat(output: Any) -> list[np.ndarray]:
    """Return all arrays of an output, in order."""
    if hasattr(output, "text_model_output"):  # whose pooled states PyTorch's model overwrites with projected ones
        states = [output.text_model_output.last_hidden_state, output.vision_model_output.last_hidden_state]
        return [array for part in (*output.to_tuple()[:4], *states) for array in flat(part)]
    if isinstance(output, torch.Tensor | jax.Array):
        return [np.asarray(output.detach() if isinstance(output, torch.Tensor) else output)]
    parts = output if isinstance(output, tuple) else output.to_tuple()
    return [array for part in parts for array in flat(part)]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-9)])
@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str, dtype: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config, inputs = CASES[name]
    if kind == "T5EncoderModel" and dtype == "float64":  # upstream rounds to float32 in the norm and the softmax
        monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
        original = torch.Tensor.to
        monkeypatch.setattr(
            torch.Tensor,
            "to",
            lambda tensor, *args, **kwargs: (
                tensor if args[:1] == (torch.float32,) and tensor.dtype == torch.float64
                else original(tensor, *args, **kwargs)
            ),
        )  # fmt: skip
    # Upstream's eager attention alone returns weights, but CLIP's has its softmax in float32.
    weights = dtype == "float32" or kind == "T5EncoderModel"
    reference = random_model(getattr(transformers, kind), config, "eager" if weights else "sdpa")
    reference.save_pretrained(tmp_path)
    reference = reference.to(getattr(torch, dtype))
    asked = {"output_hidden_states": True, "output_attentions": weights}
    asked = {} if kind == "CLIPModel" else asked  # PyTorch's takes no such arguments
    expected = flat(reference(**to_torch(inputs, getattr(torch, dtype)), **asked))
    with jax.enable_x64(dtype == "float64"):
        model = getattr(flax_diffusion, f"Flax{kind}").from_pretrained(tmp_path, dtype=dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
        ours = flat(model(**inputs, params=params, **asked))
    assert len(ours) == len(expected)
    for own, theirs in zip(ours, expected, strict=True):
        assert own.dtype == dtype
        assert np.linalg.norm(own - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", CASES)
def test_pytorch_loads_what_is_saved(name: str, tmp_path: Path) -> None:
    kind, config, _ = CASES[name]
    cls = getattr(flax_diffusion, f"Flax{kind}")
    model = cls(config, seed=3)
    model.save_pretrained(tmp_path)
    _, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    again = cls.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.module == model.module


def test_features(tmp_path: Path) -> None:
    reference = random_model(transformers.CLIPModel, clip_config())
    reference.save_pretrained(tmp_path)
    model = flax_diffusion.FlaxCLIPModel.from_pretrained(tmp_path)
    text = reference.text_projection(reference.text_model(torch.from_numpy(IDS)).pooler_output)
    image = reference.visual_projection(reference.vision_model(torch.from_numpy(PIXELS)).pooler_output)
    np.testing.assert_allclose(model.get_text_features(IDS), text.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(model.get_image_features(PIXELS), image.detach().numpy(), atol=1e-5)


def test_safety_checker(tmp_path: Path) -> None:
    """Both find the same images; thresholds lie between the similarities of the images."""
    reference = random_model(StableDiffusionSafetyChecker, clip_config())
    images = np.random.default_rng(2).standard_normal((8, 3, 8, 8)).astype(np.float32)
    embeds = reference.visual_projection(reference.vision_model(torch.from_numpy(images)).pooler_output)
    for part, share in (("concept_embeds", 0.97), ("special_care_embeds", 0.8)):
        rows = torch.randn(getattr(reference, part).shape)
        scores = torch.nn.functional.normalize(embeds) @ torch.nn.functional.normalize(rows).T
        getattr(reference, part).data = rows
        getattr(reference, f"{part}_weights").data = torch.quantile(scores.detach(), share, dim=0)
    reference.save_pretrained(tmp_path)
    _, expected = reference(torch.from_numpy(images), np.zeros((8, 4, 4, 3)))
    assert 0 < sum(expected) < 8
    checker = flax_diffusion.FlaxStableDiffusionSafetyChecker.from_pretrained(tmp_path)
    assert checker(images).tolist() == expected
    assert jax.jit(lambda params: checker(images, params))(checker.params).tolist() == expected


def test_dropout_of_t5() -> None:
    model = flax_diffusion.FlaxT5EncoderModel(t5_config(dropout_rate=0.5))
    quiet = model(LONG_IDS)[0]
    first, again, other = (model(LONG_IDS, train=True, dropout_rng=jax.random.key(seed))[0] for seed in (0, 0, 1))
    assert jnp.array_equal(first, again)
    assert not jnp.array_equal(first, other)
    assert not jnp.array_equal(first, quiet)
