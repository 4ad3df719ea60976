"""Statistics of real pictures on disk: our own files, and those of guided-diffusion, pytorch-fid and clean-fid."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from flax_diffusion.core.errors import ConfigError, DataError, shown
from flax_diffusion.core.io.files import local_copy, replacing
from flax_diffusion.core.metrics.statistics import Moments

_PICTURES = "arr_0"  # of guided-diffusion's reference batches
_NOT_NPZ = (ValueError, KeyError, EOFError, TypeError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What pictures and their features are: statistics are comparable where all of this is the same.

    Attributes:
        feature: Name of the feature.
        size: Height and width of the pictures in pixels; None where that is not known.
        channels: 1 for grey pictures, 3 for RGB; None where that is not known.
        weights: Fingerprint of the weights that computed the features; None for no weights, or where it is not known.
    """

    feature: str
    size: tuple[int, int] | None = None
    channels: int | None = None
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real pictures.

    Attributes:
        mean: Mean of the features, float64 (D,).
        covariance: Their covariance, float64 (D, D).
        count: Number of pictures; None where that is not known.
        kind: What they are of; None for a file of others, which does not say.
        features: Features of some or all of the pictures, float32 (n, D); None where there are none.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    kind: Kind | None = None
    features: np.ndarray | None = None

    @classmethod
    def of(cls, moments: Moments, kind: Kind, features: np.ndarray | None) -> Reference:
        """Return the statistics of features that were computed here."""
        return cls(mean=moments.mean, covariance=moments.covariance, count=moments.count, kind=kind, features=features)


@dataclass(frozen=True)
class Archive:
    """An npz file that was named as reference.

    Attributes:
        path: The file, on this machine.
        statistics: What it says of the pictures; None if it holds none but the pictures themselves.
        pictures_shape: Shape (N, H, W, C) of the pictures that it holds; None if it holds none.
    """

    path: Path
    statistics: Reference | None
    pictures_shape: tuple[int, ...] | None

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield its pictures, uint8 (B, H, W, C), of which only a batch is in memory at a time.

        Args:
            batch_size: Number of pictures in a batch.

        Raises:
            DataError: If the file ends too soon.
        """
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{_PICTURES}.npy") as file:
            count, *shape = _picture_header(file)
            size = int(np.prod(shape))
            for first in range(0, count, batch_size):
                wanted = min(batch_size, count - first)
                data = file.read(wanted * size)
                if len(data) != wanted * size:
                    raise DataError(f"--reference {self.path}: ends after {first} of {count} pictures: fetch it again")
                yield np.frombuffer(data, np.uint8).reshape(wanted, *shape)


def open_archive(path: Path) -> Archive:
    """Open an npz file: statistics, pictures, or both.

    Args:
        path: The file, on this machine or in an object store.

    Raises:
        DataError: If it cannot be read, or holds something else.
    """
    if not path.is_file():
        raise DataError(f"--reference {path}: does not exist; give an npz file or a folder of pictures")
    path = local_copy(path.parent, (path.name,)) / path.name
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = arrays.files
            statistics = _statistics(arrays, path) if {"mu", "sigma"} <= set(names) else None
        shape = None
        if _PICTURES in names:
            with zipfile.ZipFile(path) as archive, archive.open(f"{_PICTURES}.npy") as file:
                shape = _picture_header(file)
    except (OSError, *_NOT_NPZ) as error:
        raise DataError(f"--reference {path}: is no npz file of statistics or pictures ({error})") from error
    if statistics is None and shape is None:
        raise DataError(
            f"--reference {path}: holds {', '.join(names[:5]) or 'nothing'}; must hold mu and sigma, or pictures as "
            f"{_PICTURES}"
        )
    return Archive(path, statistics, shape)


def _picture_header(file: Any) -> tuple[int, ...]:
    """Read the start of an array of pictures, and return its shape.

    Raises:
        ValueError: If it is none of 8-bit pictures.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, by_columns, dtype = readers[np.lib.format.read_magic(file)](file)
    if dtype != np.uint8 or by_columns or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise ValueError(f"{_PICTURES} is {dtype} {shape}, must be uint8 pictures (N, H, W, 1 or 3)")
    return shape


def _statistics(arrays: Mapping[str, np.ndarray], path: Path) -> Reference:
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"mu has shape {mean.shape} and sigma {covariance.shape}, must be (D,) and (D, D)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mu or sigma holds values that are not finite")
    if "feature" not in arrays:
        return Reference(mean=mean, covariance=covariance)
    height, width = (int(side) for side in arrays["resolution"])
    kind = Kind(
        feature=str(arrays["feature"]),
        size=(height, width),
        channels=int(arrays["channels"]),
        weights=str(arrays["weights"]) or None,
    )
    features = np.asarray(arrays["features"], np.float32) if "features" in arrays else None
    if features is not None and features.shape[1:] != mean.shape:
        raise ValueError(f"features have shape {features.shape}, must be (n, {len(mean)})")
    return Reference(mean=mean, covariance=covariance, count=int(arrays["count"]), kind=kind, features=features)


def save_reference(path: Path, reference: Reference) -> None:
    """Write statistics that were computed here: `mu` and `sigma` as others name them, and what they are of.

    Args:
        path: The npz file.
        reference: The statistics.

    Raises:
        ConfigError: If the file cannot be written.
    """
    kind = reference.kind
    assert kind is not None
    arrays: dict[str, Any] = {
        "mu": reference.mean, "sigma": reference.covariance, "count": reference.count, "feature": kind.feature,
        "resolution": kind.size, "channels": kind.channels, "weights": kind.weights or "",
    }  # fmt: skip
    if reference.features is not None:
        arrays["features"] = reference.features
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            _write(file, arrays)
    except OSError as error:
        raise ConfigError(f"--save_reference {path}: cannot be written: {error.strerror or error}") from error


def _write(file: BinaryIO, arrays: Mapping[str, Any]) -> None:
    np.savez(file, **cast(Any, {name: np.asarray(value) for name, value in arrays.items()}))


def check_comparable(reference: Reference, kind: Kind, dimension: int, name: str) -> None:
    """Refuse statistics of other features or other pictures than those that are judged.

    Args:
        reference: The statistics.
        kind: What is judged.
        dimension: Number of its features.
        name: What the reference was named by, for the message.

    Raises:
        ConfigError: If they differ in anything that is known of both.
    """
    start = f"--reference {name}:"
    theirs = reference.kind or Kind(feature=kind.feature)
    if theirs.feature != kind.feature:
        raise ConfigError(
            f"{start} is of the feature {shown(theirs.feature)}, the pictures are judged by {kind.feature}: give "
            f"--features {theirs.feature}, or a reference made with --features {kind.feature}"
        )
    if theirs.size and kind.size and theirs.size != kind.size:
        sizes = ["x".join(map(str, reversed(size))) for size in (theirs.size, kind.size)]
        raise ConfigError(
            f"{start} is of pictures of {sizes[0]} pixels, those to judge have {sizes[1]}: make one of that size from "
            "the folder of real pictures by --save_reference"
        )
    if theirs.channels and kind.channels and theirs.channels != kind.channels:
        words = {1: "grey", 3: "RGB"}
        raise ConfigError(
            f"{start} is of {words[theirs.channels]} pictures, those to judge are {words[kind.channels]}: make one of "
            "these by --save_reference"
        )
    if theirs.weights and kind.weights and theirs.weights != kind.weights:
        raise ConfigError(
            f"{start} was made with other weights ({theirs.weights}) than --inception has ({kind.weights}): give the "
            "file that it was made with, or make it anew by --save_reference"
        )
    if len(reference.mean) != dimension:
        raise ConfigError(
            f"{start} has {len(reference.mean)} features, the pictures have {dimension} ({kind.feature}): give a "
            "reference of that feature and size"
        )
