"""Pictures on their way into a pipeline and out of it."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from flax_diffusion.core.errors import DataError

Pictures = Image.Image | Sequence[Image.Image]


def as_list(pictures: Pictures, what: str) -> list[Image.Image]:
    """Return pictures as a list.

    Args:
        pictures: One Pillow picture, or several.
        what: Name of the argument, for the error.

    Raises:
        DataError: If it is anything else, or empty.
    """
    found = [pictures] if isinstance(pictures, Image.Image) else list(pictures) if isinstance(pictures, list) else []
    if not found or not all(isinstance(picture, Image.Image) for picture in found):
        raise DataError(f"{what} is {type(pictures).__name__}: give a Pillow picture, or a list of them")
    return found


def to_array(pictures: Sequence[Image.Image], multiple: int) -> Array:
    """Resize pictures to sides that a model takes, and stack them.

    Args:
        pictures: Pillow pictures.
        multiple: The sides are rounded down to multiples of it, by Lanczos filtering.

    Returns:
        The pictures, float32 (N, 3, H, W) in [0, 1].

    Raises:
        DataError: If a side is shorter than `multiple`, or the sizes differ.
    """
    return _stack([_resized(picture.convert("RGB"), multiple, Image.Resampling.LANCZOS) for picture in pictures])


def to_masks(pictures: Sequence[Image.Image], multiple: int) -> Array:
    """Resize masks as `to_array` does, by Pillow's usual filter, and make them 0 or 1.

    Args:
        pictures: Pillow pictures; what is lighter than half is masked.
        multiple: The sides are rounded down to multiples of it.

    Returns:
        The masks, float32 (N, 1, H, W), 1 where a picture is painted anew.

    Raises:
        DataError: If a side is shorter than `multiple`, or the sizes differ.
    """
    masks = _stack([_resized(picture, multiple, None).convert("L") for picture in pictures])
    return (masks >= 0.5).astype(jnp.float32)


def _resized(picture: Image.Image, multiple: int, filtering: Image.Resampling | None) -> Image.Image:
    width, height = (side - side % multiple for side in picture.size)
    if not width or not height:
        raise DataError(f"picture of {picture.width}x{picture.height}: its sides must be {multiple} or more")
    return picture.resize((width, height), resample=filtering)


def _stack(pictures: Sequence[Image.Image]) -> Array:
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes[:3])
        raise DataError(f"pictures of one batch have several sizes ({shown}): resize them to one")
    arrays = [np.asarray(picture, np.float32) / np.float32(255) for picture in pictures]
    channels_last = [array if array.ndim == 3 else array[..., None] for array in arrays]
    return jnp.asarray(np.stack(channels_last).transpose(0, 3, 1, 2))


def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
    """Return arrays as Pillow pictures.

    Args:
        images: Floats in [0, 1], (N, H, W, C) or (H, W, C), with 1 or 3 channels.

    Returns:
        One picture for each.
    """
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    bytes_ = (images * 255).round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in bytes_]
