"""The command that judges pictures: what is drawn or read, compared with what, and where the values go."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.display import console
from flax_diffusion.core.drawing.command import guidance_scale, prompts_of
from flax_diffusion.core.drawing.evaluation_options import (
    EvaluateOptions,
    check_least,
    check_shares,
    count_of,
    drawing,
    metrics_of,
    shared,
)
from flax_diffusion.core.drawing.options import GenerateConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import as_path, replacing, write_json
from flax_diffusion.core.metrics import pictures
from flax_diffusion.core.metrics.judging import Extractor, Sets, collect, judge, needs
from flax_diffusion.core.metrics.reference import (
    Archive,
    Kind,
    Reference,
    check_comparable,
    open_archive,
    save_reference,
)
from flax_diffusion.core.spec.pipeline import PipelineSpec

MAX_DIMENSION = 64 * 64 * 3
"""Largest number of features; their covariance takes 1.2 GB."""
Row = dict[str, float]
"""Values by column: the scale of guidance, where pictures are drawn, their number, and the metrics."""


class Backend(Protocol):
    """What draws and computes features.

    Attributes:
        is_main: Whether this process is the one that writes and prints.
    """

    is_main: bool

    def extractor(self, config: EvaluateOptions) -> Extractor:
        """Return what computes the features."""
        ...

    def open_spec(self, config: GenerateConfig) -> PipelineSpec:
        """Open a pipeline without its weights."""
        ...

    def drawer(self, config: GenerateConfig, spec: PipelineSpec) -> Callable[[GenerateConfig], Iterator[np.ndarray]]:
        """Load a pipeline's weights, and return what draws pictures with it, uint8 (B, H, W, C) at a time."""
        ...


@dataclass(frozen=True)
class _Subject:
    """What is judged."""

    size: tuple[int, int] | None  # None where only a reference is made of an npz file, which has its own
    channels: int | None
    count: int
    spec: PipelineSpec | None = None
    source: Source | None = None


class Evaluation:
    """Pictures to judge and what they are compared with, both checked before anything is drawn or read.

    Attributes:
        names: Names of the metrics, in the order of the table.
        count: Number of pictures to judge; 0 where only a reference is made.

    Args:
        config: The options.
        backend: Draws and computes features.

    Raises:
        UserError: For input that cannot be used.
    """

    def __init__(self, config: EvaluateOptions, backend: Backend):
        self.names = metrics_of(config)
        self._config, self._backend = config, backend
        self._real = None if config.reference is None else _open_reference(config.reference)
        self._extractor = backend.extractor(config)
        self._subject = _subject(config, backend)
        self.count = self._subject.count
        if self._subject.source is not None:
            check_least(self.names, self.count, f"--images {config.images}")
        self._kind, dimension = _kind(self._subject, self._real, self._extractor)
        if isinstance(self._real, Archive):
            _check_archive(self._real, config, self.names, self._kind, dimension)
        elif self._real is not None:
            check_least(needs(self.names, "needs_reference"), len(self._real), f"--reference {config.reference}")

    @functools.cached_property
    def reference(self) -> Reference | None:
        """Statistics of the real pictures, which are computed where they are not there; None where none are needed."""
        if self._real is None:
            return None
        return _reference(self._real, self._config, self.names, self._kind, self._extractor, self._backend)

    def rows(self) -> list[Row]:
        """Judge the pictures: a row for each scale of guidance, or one for pictures that were there."""
        return [*_rows(self._config, self.names, self._subject, self.reference, self._extractor, self._backend)]


def run(config: EvaluateOptions, backend: Backend) -> list[Row]:
    """Judge pictures, as the command line does.

    Args:
        config: The options.
        backend: Draws and computes features.

    Returns:
        A row for each scale of guidance, or one for pictures that were there; none where only a reference is made.

    Raises:
        UserError: For input that cannot be used.
    """
    evaluation = Evaluation(config, backend)
    for option in ("save_reference", "output"):
        _check_writable(option, getattr(config, option), backend)
    reference = evaluation.reference
    if reference is not None and config.save_reference is not None and backend.is_main:
        save_reference(as_path(config.save_reference), reference)
    rows = evaluation.rows()
    if config.output is not None and backend.is_main:
        about = {"model": config.model, "images": config.images, "reference": config.reference}
        given = {name: value for name, value in about.items() if value is not None}
        write_json(as_path(config.output), {**given, "features": config.features, "results": rows})
    return rows


def _open_reference(name: str) -> Archive | Source:
    return open_archive(as_path(name)) if name.endswith(".npz") else pictures.open_pictures(name, "--reference")


def _subject(config: EvaluateOptions, backend: Backend) -> _Subject:
    """Open what is judged, without drawing or reading it."""
    square = None if config.resolution is None else (config.resolution, config.resolution)
    if config.model is not None:
        spec = backend.open_spec(drawing(config, max(config.guidance_scale, default=None)))
        check_shares(count_of(config), len(prompts_of(drawing(config), spec)))
        size = spec.size or (spec.resolution, spec.resolution)
        if square not in (None, size):
            raise ConfigError(
                f"--resolution {config.resolution}: the model draws {size[1]}x{size[0]} pixels; drop it, or give "
                "--height and --width"
            )
        if config.channels not in (None, spec.image_channels):
            raise ConfigError(f"--channels {config.channels}: the model draws {spec.image_channels}; drop it")
        return _Subject(size, spec.image_channels, count_of(config), spec=spec)
    if config.images is None:
        return _Subject(square, config.channels or 3, 0)
    source = pictures.open_pictures(config.images, "--images")
    count = len(source) if config.num_images is None else config.num_images
    if count > len(source):
        raise ConfigError(f"--num_images {count}: --images {config.images} holds {len(source)}; ask for at most these")
    return _Subject(square or pictures.size_of_first(source), config.channels or 3, count, source=source)


def _kind(subject: _Subject, real: Archive | Source | None, extractor: Extractor) -> tuple[Kind, int]:
    """Return what is judged, for comparing it with the reference, and the number of its features.

    Raises:
        ConfigError: If its size is not known, or there are too many features.
    """
    size, channels = subject.size, subject.channels
    if subject.spec is None and subject.source is None and isinstance(real, Archive) and real.pictures_shape:
        _, height, width, channels = real.pictures_shape
        size = (height, width)
    if size is None or channels is None:
        raise ConfigError("--save_reference: the npz file holds statistics already; give real pictures by --reference")
    kind = Kind(feature=extractor.feature, size=size, channels=channels, weights=extractor.weights)
    dimension = extractor.dimension(size, channels)
    if dimension > MAX_DIMENSION:
        raise ConfigError(
            f"--features {extractor.feature}: pictures of {size[1]}x{size[0]} pixels have {dimension} values, more "
            f"than the {MAX_DIMENSION} whose covariance can be computed: use --features inception"
        )
    return kind, dimension


def _check_archive(archive: Archive, config: EvaluateOptions, names: list[str], kind: Kind, dimension: int) -> None:
    """Refuse an npz file that does not fit what is judged, or the metrics.

    Raises:
        ConfigError: If it does not.
    """
    name, statistics, count = str(config.reference), archive.statistics, None
    if archive.pictures_shape is not None:
        count, height, width, channels = archive.pictures_shape
        own = Kind(feature=kind.feature, size=(height, width), channels=channels if kind.feature == "pixels" else None)
        there = statistics or Reference(mean=np.empty(dimension), covariance=np.empty((0, 0)))
        check_comparable(replace(there, kind=there.kind or own), kind, dimension, name)
    elif statistics is not None:
        check_comparable(statistics, kind, dimension, name)
        count = statistics.count
        themselves = needs(names, "needs_features")
        if themselves and statistics.features is None:
            raise ConfigError(
                f"--reference {name}: holds no features, only their mean and covariance, and --metrics {themselves[0]} "
                "needs them: give the real pictures, or a file made of them by --save_reference with that metric"
            )
        count = count if statistics.features is None or not themselves else len(statistics.features)
    if statistics is not None and config.save_reference is not None:
        raise ConfigError(f"--save_reference {config.save_reference}: {name} holds statistics already; drop it")
    if count is not None:
        check_least(needs(names, "needs_reference"), count, f"--reference {name}")


def _check_writable(option: str, name: str | None, backend: Backend) -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Raises:
        ConfigError: If it cannot.
    """
    if name is None or not backend.is_main:
        return
    path = as_path(name)
    try:
        if path.is_dir():
            raise ConfigError(f"--{option} {name}: is a folder; name a file")
        with replacing(path.with_name(f".{path.name}.room")) as partial:
            partial.write_bytes(b"")
        path.with_name(f".{path.name}.room").unlink()
    except OSError as error:
        raise ConfigError(f"--{option} {name}: cannot be written: {error.strerror or error}") from error


def _reference(
    real: Archive | Source,
    config: EvaluateOptions,
    names: list[str],
    kind: Kind,
    extractor: Extractor,
    backend: Backend,
) -> Reference:
    """Return the statistics of the real pictures, which are computed where they are not there."""
    statistics = None
    if isinstance(real, Archive):
        statistics, shape = real.statistics, real.pictures_shape
        lacks_features = statistics is None or (statistics.features is None and bool(needs(names, "needs_features")))
        if statistics is not None and not lacks_features:
            return statistics
        assert shape is not None
        count, batches = shape[0], real.batches(config.batch_size)
    else:
        count, batches = len(real), _read(real, config, kind, None, resize=True)
    found = collect(_shown(batches, count, "real pictures", backend), extractor, count, names, real=True)
    if statistics is not None:  # published ones are of all pictures, of which the file may hold a part
        return replace(statistics, features=found.features)
    return Reference.of(found.moments, kind, found.features)


def _read(
    source: Source, config: EvaluateOptions, kind: Kind, count: int | None, *, resize: bool
) -> Iterator[np.ndarray]:
    assert kind.size is not None
    channels: Any = kind.channels
    return pictures.batches(
        source, kind.size, channels, config.image_interpolation_mode, config.batch_size, resize=resize, count=count
    )


def _shown(batches: Iterable[np.ndarray], count: int, what: str, backend: Backend) -> Iterator[np.ndarray]:
    """Yield batches, and show on the console how many pictures of all there were."""
    with console.current().counting(what, count, "pictures") as add:
        for batch in batches:
            yield batch
            add(len(batch))
    if backend.is_main:
        console.current().say(f"{what}: {count:,} pictures")


def _rows(
    config: EvaluateOptions,
    names: list[str],
    subject: _Subject,
    reference: Reference | None,
    extractor: Extractor,
    backend: Backend,
) -> Iterator[Row]:
    """Yield the values of each set of pictures, once it is judged."""
    seed: int = shared(config, "seed")

    def judged(batches: Iterator[np.ndarray], what: str) -> Row:
        found = collect(_shown(batches, subject.count, what, backend), extractor, subject.count, names)
        return {"pictures": subject.count, **dict(judge(names, Sets(found, reference, seed)))}

    if subject.source is not None:
        assert subject.size is not None
        kind = Kind(feature=extractor.feature, size=subject.size, channels=subject.channels)
        resize = config.resolution is not None
        yield judged(_read(subject.source, config, kind, subject.count, resize=resize), "pictures")
    if subject.spec is not None:
        shares = max(1, len(prompts_of(drawing(config), subject.spec)))
        draw = backend.drawer(drawing(config), subject.spec)
        for scale in config.guidance_scale or [guidance_scale(drawing(config), subject.spec)]:
            row = judged(draw(drawing(config, scale, shares)), f"guidance {scale:g}")
            yield {"guidance_scale": scale, **row}


def table(rows: list[Row]) -> str:
    """Return the values as a table of text, a line for each row below the names of the columns."""
    texts = [[*rows[0]], *([_number(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in texts)
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:d}" if isinstance(value, int) else f"{value:.5g}"


def show(config: EvaluateOptions, rows: list[Row], backend: Backend) -> None:
    """Print the table on stdout, and on stderr what was written.

    Args:
        config: The options.
        rows: The values.
        backend: Says whether this process prints.
    """
    if not backend.is_main:
        return
    if rows:
        sys.stdout.write(table(rows))
    for path in (config.save_reference, config.output):
        if path is not None:
            sys.stderr.write(f"{path} is written\n")
