"""Pictures of classes, by a transformer over patches (DiT, SiT): in the latents of an autoencoder, or in pixels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.autoencoder import AUTOENCODER_KL
from flax_diffusion.core.families.family import FAMILIES, NOTHING, ClassTable, Family, ModelClass, PipelineClass, Role
from flax_diffusion.core.typed import Count, Size

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import Component, PipelineSpec

log = logging.getLogger(__name__)

OPTIONS = ("qk_norm", "rotary", "rms_norm")
"""Config keys that Diffusers' class has not: see `FlaxDiTTransformer2DModel`."""
WITH_OPTIONS = "ada_norm_zero_with_options"
"""The norm_type in the config.json of a model with such options. Diffusers' class, which would ignore the keys that it
does not know and compute something else, refuses it."""
FORMER_KEYS = frozenset({
    "attention_type", "caption_channels", "cross_attention_dim", "double_self_attention", "interpolation_scale",
    "num_vector_embeds", "only_cross_attention", "use_additional_conditions", "use_linear_projection",
})  # fmt: skip
"""Config keys of the published DiT-XL/2 models, whose class was then Transformer2DModel; a DiT has none of these."""


class _DiT:
    sample_size: Size = 32
    in_channels: Size = 4
    out_channels: Size | None = None
    patch_size: Size = 2
    num_layers: Count = 28
    num_attention_heads: Size = 16
    attention_head_dim: Size = 72
    num_embeds_ada_norm: Size = 1000
    norm_type: str = "ada_norm_zero"
    qk_norm: bool = False
    rotary: bool = False
    rms_norm: bool = False


_WIDTHS = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}
SIZES: dict[str, dict[str, Any]] = {
    f"{paper}-{size}/{patch}": {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "patch_size": patch,
    }
    for paper in ("DiT", "SiT")
    for size, (layers, heads, head_dim) in _WIDTHS.items()
    for patch in (2, 4, 8)
}
"""Configs by the names of the papers, but for channels, classes and sample_size, which come from the data.

Reference:
    Peebles and Xie, https://arxiv.org/abs/2212.09748, table 1; Ma et al., https://arxiv.org/abs/2401.08740.
"""


def chosen_options(config: Mapping[str, Any]) -> list[str]:
    """Return which of `OPTIONS` a model's config turns on."""
    return [name for name in OPTIONS if config.get(name)]


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ConfigError where values of a model's whole config contradict each other."""
    heads, channels = config["num_attention_heads"], config["attention_head_dim"]
    if heads * channels % 4:
        raise ConfigError(
            f"num_attention_heads={heads} times attention_head_dim={channels} is {heads * channels}: make it a "
            "multiple of 4, for the embeddings of the places"
        )
    if config.get("rotary") and channels % 4:
        raise ConfigError(f"rotary with attention_head_dim={channels}: make it a multiple of 4")
    if not config["num_layers"]:
        raise ConfigError("num_layers=0: make it 1 or more, as the first block embeds time and class")
    if config["sample_size"] % config["patch_size"]:
        raise ConfigError(
            f"patch_size={config['patch_size']} does not divide sample_size={config['sample_size']}: change one of them"
        )


def learns_variance(denoiser: Component) -> bool:
    """Return whether a second half of the predicted channels is of the variance.

    Reference:
        Nichol and Dhariwal, https://arxiv.org/abs/2102.09672, equation 15.
    """
    return denoiser["out_channels"] == 2 * denoiser["in_channels"]


def _channels(transformer: Component) -> tuple[int, int]:
    """Return the channels of the sample that it takes and predicts, without those of a learned variance."""
    given = transformer["in_channels"]
    return given, given if learns_variance(transformer) else transformer["out_channels"] or given


def _patch(transformer: Component) -> int:
    return transformer["patch_size"]


def _check(spec: PipelineSpec) -> None:
    transformer = spec.denoiser
    if on := chosen_options(transformer.config):
        log.warning(
            "%s: Diffusers has no such option; the pipeline that this run writes is opened here, and not by Diffusers",
            ", ".join(on),
        )
    if transformer["norm_type"] not in ("ada_norm_zero", WITH_OPTIONS):
        raise ConfigError(
            f"transformer of norm_type {transformer['norm_type']!r}: a DiT has 'ada_norm_zero'; use such a model"
        )


CARD = """## How to draw

Pictures of {count} classes, by a transformer and flow matching. Diffusers' `DiTPipeline` draws from models that predict
noise. This one predicts a velocity, and is drawn from by plain classes of Diffusers, here in {steps} steps of Euler's
method without guidance. `folder` is this folder.

```python
import torch, diffusers
labels = torch.tensor([0, 1, 2, 3]) % {count}  # {names}
model = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
x = torch.randn(len(labels), {shape})
scheduler.set_timesteps({steps})
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x)), labels).sample, t, x).prev_sample
{decode}```

With guidance, on JAX or PyTorch: `python -m flax_diffusion.generate --model FOLDER --class_label all`.
"""
"""Part of the model card of a pipeline of flow matching."""

_DECODED = """    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    x = vae.decode(x / vae.config.scaling_factor).sample
"""


def _card(spec: PipelineSpec) -> str | None:
    """Return how to draw from a pipeline whose parts Diffusers draws with, and its DiTPipeline does not."""
    if spec.objective.name != "flow_matching" or chosen_options(spec.denoiser.config) or learns_variance(spec.denoiser):
        return None
    names = " ".join(spec.classes[:4]) + (" …" if len(spec.classes) > 4 else "")
    return CARD.format(
        count=len(spec.classes),
        names=" ".join(names.split()),
        shape=", ".join(map(str, spec.sample_shape)),
        steps=50,
        decode=_DECODED if spec.vae else "",
    )


DIT_TRANSFORMER = ModelClass(
    name="DiTTransformer2DModel",
    role=Role.DENOISER,
    schema=_DiT,
    noun="transformer",
    former_names=("Transformer2DModel",),
    former_keys=FORMER_KEYS,
    channels=_channels,
    divides_by=_patch,
    sizes=SIZES,
)

DIT = FAMILIES.register(
    "dit",
    Family(
        name="dit",
        title="a DiTPipeline",
        pipelines={
            "DiTPipeline": PipelineClass(
                parts={"transformer": DIT_TRANSFORMER, "vae": AUTOENCODER_KL}, index={"vae": NOTHING}
            )
        },
        class_table=ClassTable(key="num_embeds_ada_norm", counts_null=False),
        check=_check,
        card=_card,
    ),
)
