"""Initial values of a new model's parameters, the same on every backend, device and host."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_diffusion.core.randomness.streams import Stream, example_rng

ZERO = re.compile(r"controlnet_(down_blocks|mid_block|cond_embedding\.conv_out)\b")
"""Names of layers that start at zero: a new ControlNet changes nothing (Zhang et al. 2023, equation 3)."""
DIT_ZERO = re.compile(r".*\.norm1\.linear\.|proj_out_[12]\.")
DIT_NORMAL = re.compile(r".*\.norm1\.emb\.")
"""Names of a DiT's layers that start at zero, so that new blocks change nothing, and that are drawn from N(0, 0.02²).

The others are uniform within ±√(6 / (fan_in + fan_out)). From the code of Peebles and Xie; section 3.2 of their paper,
https://arxiv.org/abs/2212.09748, says why.
"""


def draw(seed: int, kind: str, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw a parameter: PyTorch's default distribution for kernels and embeddings, zero for biases, one for scales.

    A ControlNet's zero convolutions are zero. A DiT is drawn as in its paper: see `DIT_ZERO`.

    Args:
        seed: Seed of the run.
        kind: PyTorch class of the model, such as UNet2DModel; its name keeps the models of a pipeline apart.
        config: Config of the model.
        name: The parameter's PyTorch name.
        shape: Shape in PyTorch's layout: (out, in, height, width), (out, in), (rows, features) or (features,).

    Returns:
        The values, float32, of that shape.

    Reference:
        torch.nn.Linear and Conv2d (uniform within ±1/√fan_in); `normal_std` for the normal distributions.
    """
    is_dit = kind.startswith("DiT")
    if name.endswith("bias") or (DIT_ZERO if is_dit else ZERO).match(name):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    rng = example_rng(seed, Stream.WEIGHTS, 0, name_number(kind, name))
    std = normal_std(kind, config, name)
    if std is not None:
        return rng.standard_normal(shape, np.float32) * np.float32(std)
    fan_in = math.prod(shape[1:])
    bound = math.sqrt(6 / (fan_in + shape[0])) if is_dit else 1 / math.sqrt(fan_in)
    return (rng.random(shape, np.float32) * 2 - 1) * np.float32(bound)


def name_number(kind: str, name: str) -> int:
    """Return the number that stands for a parameter as the example index of `example_rng`.

    Args:
        kind: PyTorch class of the model.
        name: The parameter's PyTorch name.
    """
    return zlib.crc32(f"{kind}/{name}".encode())


def normal_std(kind: str, config: Mapping[str, Any], name: str) -> float | None:
    """Return the standard deviation of a parameter that is drawn from a normal distribution; None for the others.

    Args:
        kind: PyTorch class of the model.
        config: Config of the model; for CLIP with hidden_size, num_hidden_layers and initializer_factor.
        name: The parameter's PyTorch name.

    Reference:
        torch.nn.Embedding (1); CLIPPreTrainedModel._init_weights of Transformers, which has the embeddings' 0.02
        as a constant, too.
    """
    if kind.startswith("DiT"):
        return 0.02 if DIT_NORMAL.match(name) else None
    module = name.split(".")[-2]
    if not kind.startswith("CLIP"):
        return 1.0 if module == "class_embedding" else None
    hidden = config["hidden_size"]
    inner = hidden**-0.5 * (2 * config["num_hidden_layers"]) ** -0.5
    stds = {"token_embedding": 0.02, "position_embedding": 0.02, "fc1": (2 * hidden) ** -0.5}
    stds |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "fc2"), inner)
    stds |= dict.fromkeys(("out_proj", "text_projection"), hidden**-0.5)
    return stds[module] * config["initializer_factor"]
