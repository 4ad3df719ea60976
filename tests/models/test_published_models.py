"""The published models at full size: names and shapes of all parameters, and one real forward pass."""

import json
from pathlib import Path
from typing import Any

import diffusers
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from flax_diffusion import models
from flax_diffusion.core.io.torch_names import torch_name, torch_shape
from flax_diffusion.models.modeling import PretrainedModel

CONFIGS = Path(__file__).parent / "configs"
MODULES = {
    kind.torch_class: kind
    for kind in vars(models).values()
    if isinstance(kind, type) and issubclass(kind, PretrainedModel) and kind is not PretrainedModel
}
# Known from the model cards, to tell a wrong config from a right one.
MILLIONS = {
    "sd15_unet": 859.5,
    "sd21_unet": 865.9,
    "sdxl_unet": 2567.5,
    "sd15_vae": 83.7,
    "sd15_text_encoder": 123.1,
    "sd21_text_encoder": 340.4,
    "sdxl_text_encoder_2": 694.7,
    "ddpm_cifar10_unet": 35.7,
    "ddpm_ema_celebahq_unet": 113.7,
}


def load(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return both classes and the config."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    kind = config.get("_class_name") or config["architectures"][0]
    library = diffusers if "_class_name" in config else transformers
    return MODULES[kind], getattr(library, kind), config


def torch_model(cls: Any, config: dict[str, Any]) -> torch.nn.Module:
    if issubclass(cls, transformers.PreTrainedModel):
        return cls(transformers.CLIPTextConfig(**config))
    return cls.from_config(config)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_names_and_shapes(name: str) -> None:
    ours, theirs, config = load(name)
    with torch.device("meta"):
        reference = torch_model(theirs, config)
    prefix = "text_model." if theirs is transformers.CLIPTextModel else ""
    expected = {prefix + key: tuple(value.shape) for key, value in reference.named_parameters()}
    flat = flax.traverse_util.flatten_dict(ours.from_config(config).params_shape())
    assert {torch_name(path): torch_shape(path, leaf.shape) for path, leaf in flat.items()} == expected
    if name in MILLIONS:
        assert sum(leaf.size for leaf in flat.values()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)


@pytest.mark.fullsize
def test_forward_of_stable_diffusion_15(tmp_path: Path) -> None:
    ours, theirs, config = load("sd15_unet")
    torch.manual_seed(0)
    reference = torch_model(theirs, config).eval()
    reference.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((1, 4, 64, 64)).astype(np.float32)
    context = rng.standard_normal((1, 77, 768)).astype(np.float32)
    with torch.no_grad():
        inputs = torch.from_numpy(sample), torch.tensor([501]), torch.from_numpy(context)
        expected = reference(*inputs).sample.numpy()
    del reference
    model, params = ours.from_pretrained(tmp_path)
    result = jax.jit(model.apply)({"params": params}, sample, jnp.array([501]), context).sample
    assert np.linalg.norm(result - expected) <= 1e-4 * np.linalg.norm(expected)
