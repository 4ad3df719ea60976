"""Conversion of parameter names and layouts between Linen and PyTorch; files on disk have PyTorch's.

The names correspond mechanically: `down_blocks.0.attentions.1.to_out.0.weight` in PyTorch is
`down_blocks_0/attentions_1/to_out_0/kernel` here. The two tables below hold the rest.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

# Modules that PyTorch keeps in lists: `resnets_0` here, `resnets.0` there (whereas `linear_1` is a plain name).
LISTS = (
    "attentions",
    "blocks",
    "controlnet_down_blocks",
    "down_blocks",
    "downsamplers",
    "layers",
    "net",
    "resnets",
    "to_out",
    "transformer_blocks",
    "transformers",
    "up_blocks",
    "upsamplers",
)
LIST_ITEM = re.compile(rf"\b({'|'.join(LISTS)})_(\d+)\b")

# Last part of a parameter's name here, and in PyTorch.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias", "new_rows": "new_rows"}


def torch_name(path: Iterable[str]) -> str:
    """Return PyTorch's name of the parameter at a path in Linen's tree."""
    *modules, leaf = path
    return LIST_ITEM.sub(r"\1.\2", ".".join((*modules, LEAVES[leaf])))


def to_torch_layout(path: Sequence[str], array: np.ndarray) -> np.ndarray:
    """Return a view of Linen's array in PyTorch's layout.

    Args:
        path: Path of the parameter in Linen's tree. Only kernels change.
        array: A convolution's kernel (H, W, I, O), a linear layer's (I, O), or anything else.

    Returns:
        A view of shape (O, I, H, W) or (O, I); any other array as it is.
    """
    if path[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch_layout(path: Sequence[str], array: np.ndarray, ndim: int) -> np.ndarray:
    """Return a view of PyTorch's array in Linen's layout.

    Args:
        path: Path of the parameter in Linen's tree. Only kernels change.
        array: A convolution's weight (O, I, H, W), a linear layer's (O, I), or anything else.
        ndim: Number of dimensions in Linen. A 1x1 convolution may stand for a linear layer, with 2.

    Returns:
        A view of shape (H, W, I, O) or (I, O); any other array as it is.
    """
    if path[-1] != "kernel":
        return array
    if array.ndim == 4 and ndim == 2:
        array = array[:, :, 0, 0]
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def torch_shape(path: Sequence[str], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in PyTorch's layout of a parameter at a path in Linen's tree that has the given shape there."""
    return to_torch_layout(path, np.broadcast_to(np.float32(0), shape)).shape
