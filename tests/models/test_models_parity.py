"""Outputs and gradients of every model family equal PyTorch's, in float32 and in float64."""

import math
from pathlib import Path
from typing import Any

import diffusers.models.embeddings
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from cases import CASES, QUICK, Case, draw
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from proofs import proof

from flax_diffusion.models import weights

TORCH_NAMES = {"timesteps": "timestep"}


def torch_model(case: Case) -> torch.nn.Module:
    """Build the PyTorch model, every parameter random."""
    torch.manual_seed(0)
    if issubclass(case.torch, transformers.PreTrainedModel):
        model = case.torch(transformers.CLIPTextConfig(**case.config))
    else:
        model = case.torch(**case.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def torch_outputs(model: torch.nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Run the PyTorch model; the autoencoder encodes, and decodes the mean."""
    if isinstance(model, diffusers.AutoencoderKL):
        posterior = model.encode(inputs["sample"]).latent_dist
        return [posterior.mean, posterior.logvar, posterior.std, model.decode(posterior.mean).sample]
    if isinstance(model, transformers.PreTrainedModel):
        output = model(**inputs, output_hidden_states=True)
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return [output.last_hidden_state, pooled, *output.hidden_states]
    if isinstance(model, diffusers.ControlNetModel):
        output = model(**inputs, conditioning_scale=0.7)
        return [*output.down_block_res_samples, output.mid_block_res_sample]
    return [model(**inputs).sample]


def flax_outputs(model: Any, params: Any, inputs: dict[str, Any]) -> list[jax.Array]:
    """Run the Flax model in the same way."""
    if type(model).__name__ == "FlaxAutoencoderKL":
        posterior = model.apply({"params": params}, inputs["sample"], method=model.encode).latent_dist
        decoded = model.apply({"params": params}, posterior.mode(), method=model.decode).sample
        moments = (posterior.mean, posterior.logvar, posterior.std)
        return [*(moment.transpose(0, 3, 1, 2) for moment in moments), decoded]
    if "input_ids" in inputs:
        output = model.apply({"params": params}, **inputs, output_hidden_states=True)
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return [output.last_hidden_state, pooled, *output.hidden_states]
    if "controlnet_cond" in inputs:
        output = model.apply({"params": params}, **inputs, conditioning_scale=0.7)
        residuals = (*output.down_block_res_samples, output.mid_block_res_sample)
        return [residual.transpose(0, 3, 1, 2) for residual in residuals]
    return [model.apply({"params": params}, **inputs).sample]


def to_torch(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {TORCH_NAMES.get(name, name): to_torch(part, dtype) for name, part in value.items()}
    tensor = torch.from_numpy(np.array(value))
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def double_timestep_embedding(
    timesteps: torch.Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> torch.Tensor:
    """Upstream's function in double precision: the original rounds to float32 inside, whatever the model's dtype."""
    assert scale == 1
    half = embedding_dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float64) / (half - downscale_freq_shift)
    angles = timesteps[:, None].double() * exponent.exp()
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return torch.nn.functional.pad(torch.cat(parts, dim=-1), (0, embedding_dim % 2))


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    """Compare norm-wise, each array and all together.

    An array whose norm is below a thousandth of the whole is measured against that: the gradient of a key's bias,
    for one, is zero but for rounding.
    """
    assert ours.keys() == theirs.keys()
    total = math.sqrt(sum(float(np.linalg.norm(value)) ** 2 for value in theirs.values()))
    overall = math.sqrt(sum(float(np.linalg.norm(ours[name] - theirs[name])) ** 2 for name in ours))
    assert overall <= tolerance * total
    errors = {
        name: float(np.linalg.norm(ours[name] - theirs[name]) / max(np.linalg.norm(theirs[name]), 1e-3 * total))
        for name in ours
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, (worst, errors[worst])


def compare(case: Case, folder: Path, dtype: Any, tolerance: float, *, gradients: bool) -> None:
    """Load the PyTorch model's files and compare outputs, and the gradient of a random projection of them."""
    reference = torch_model(case)
    reference.save_pretrained(folder)
    reference = reference.to(torch.float64 if dtype == jnp.float64 else torch.float32)
    inputs = draw(case)
    expected = torch_outputs(reference, to_torch(inputs, next(reference.parameters()).dtype))
    rng = np.random.default_rng(2)
    cotangents = [rng.standard_normal(tuple(output.shape)) for output in expected]

    model, params = case.flax.from_pretrained(folder, dtype=dtype, param_dtype=dtype)

    def loss(params: Any) -> tuple[jax.Array, list[jax.Array]]:
        outputs = flax_outputs(model, params, inputs)
        return sum(jnp.vdot(jnp.asarray(c, o.dtype), o) for c, o in zip(cotangents, outputs, strict=True)), outputs

    step = jax.jit(jax.grad(loss, has_aux=True) if gradients else loss, compiler_options=QUICK)
    result, outputs = step(params)
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.dtype == dtype
        assert_close({"output": np.asarray(ours)}, {"output": theirs.detach().numpy()}, tolerance)
    if gradients:
        sum((torch.from_numpy(c).to(o.dtype) * o).sum() for c, o in zip(cotangents, expected, strict=True)).backward()
        prefix = "text_model." if case.torch is transformers.CLIPTextModel else ""
        expected_gradients = {
            prefix + name: np.zeros(value.shape) if value.grad is None else value.grad.numpy()
            for name, value in reference.named_parameters()
        }
        assert_close(dict(weights.to_torch(result)), expected_gradients, tolerance)


@pytest.fixture(autouse=True)
def _working_dual_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop the argument that Diffusers 0.42's blocks pass to its dual transformer, which does not take it."""
    original = DualTransformer2DModel.forward

    def forward(self: Any, *args: Any, encoder_attention_mask: None = None, **kwargs: Any) -> Any:
        assert encoder_attention_mask is None
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DualTransformer2DModel, "forward", forward)


@pytest.mark.acceptance
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_everything(name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of all families in both precisions; the quick tests below leave some out."""
    if dtype == "float32":
        compare(CASES[name], tmp_path, jnp.float32, 1e-5, gradients=True)
        return
    monkeypatch.setattr(diffusers.models.embeddings, "get_timestep_embedding", double_timestep_embedding)
    with jax.enable_x64(True):
        compare(CASES[name], tmp_path, jnp.float64, 1e-10, gradients=True)


@pytest.mark.parametrize(
    "name",
    ["tutorial", "sdxl", "vae", "clip_projection", *map(proof, ("ddpm", "scale_shift", "sd1", "simple_cross", "clip"))],
)
def test_float32(name: str, tmp_path: Path) -> None:
    gradients = name in ("tutorial", "vae", "clip_projection")  # the others' in float64 alone: compiling costs most
    compare(CASES[name], tmp_path, jnp.float32, 1e-5, gradients=gradients)


@pytest.mark.parametrize("name", CASES)
def test_float64(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.models.embeddings, "get_timestep_embedding", double_timestep_embedding)
    with jax.enable_x64(True):
        gradients = name not in ("resnet_attention_samplers", "classes", "odd_sizes", "dual", "vae_plain")
        compare(CASES[name], tmp_path, jnp.float64, 1e-10, gradients=gradients)
