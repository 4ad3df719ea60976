"""What an examination found, as plain data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flax_diffusion.core.config.options import Reads, TrainConfig, named_inputs
from flax_diffusion.core.data import buckets as bucketing
from flax_diffusion.core.data.bad import max_bad_examples
from flax_diffusion.core.data.images.transforms import ImageTransform, shown_size
from flax_diffusion.core.inspection.examination import Examination
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

_LISTED = 20
"""Most names in a list of the report; how many there are in all is said beside it."""
_LISTED_IN_TEXT = 5


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, numbers: Sequence[float] | np.ndarray) -> Spread:
        """Return the spread of at least one number."""
        return cls(float(np.min(numbers)), float(np.median(numbers)), float(np.max(numbers)))

    def __str__(self) -> str:
        if self.least == self.most:
            return f"{self.least:g}"
        return f"{self.least:g} to {self.most:g}, median {self.median:g}"


@dataclass(frozen=True)
class Listed:
    """Some things by name.

    Attributes:
        count: Their number.
        first: The first of them, each with what is said of it.
    """

    count: int
    first: list[tuple[str, str]]

    @classmethod
    def of(cls, things: Sequence[tuple[str, str]]) -> Listed:
        """Return a list that is cut to a length that a person reads."""
        return cls(len(things), list(things[:_LISTED]))


@dataclass(frozen=True)
class Captions:
    """The captions of a dataset.

    Attributes:
        count: Their number.
        empty: Pictures with an empty one.
        repeated: Captions that several pictures have, with the number of these.
        tokens: Tokens of a caption, with those at its start and end; None where there is no tokenizer.
        limit: Number of tokens that the text encoders take; None where there is no tokenizer.
        cut_off: Pictures with a caption that is too long, with the part that is not seen.
    """

    count: int
    empty: Listed
    repeated: Listed
    tokens: Spread | None
    limit: int | None
    cut_off: Listed


@dataclass(frozen=True)
class Size:
    """A size at which pictures are trained.

    Attributes:
        size: Width and height, such as "512x768".
        pictures: Number of pictures that are trained at it in an epoch, each as often as it occurs.
    """

    size: str
    pictures: int


@dataclass(frozen=True)
class Report:
    """What was found in a dataset.

    Attributes:
        task: Name of the task.
        data: Options that name the data, with their values.
        examples: Number of examples in an epoch, without those that the models draw.
        inspected: Number of examples that were looked at.
        pictures: Number of pictures among these that can be used; one that occurs several times counts once.
        broken: Pictures that cannot be used, with the reason.
        tolerated: Number of broken pictures that the run passes over.
        duplicates: Pictures that have the same bytes as others, each with the names of those.
        width: Widths of the pictures, in pixels.
        height: Their heights.
        small: Pictures that are smaller than the size that they are trained at, with their own.
        cut: Share of a picture that is cut off, from 0 to 1.
        sizes: The sizes at which they are trained.
        left_out: Number of pictures that an epoch leaves out, each time others, so that each step has pictures of one
            size.
        captions: The captions; None for a task without them.
        classes: Names of the classes, each with the number of its pictures among those that were looked at; None for a
            task without classes.
    """

    task: str
    data: dict[str, str]
    examples: int
    inspected: int
    pictures: int
    broken: Listed
    tolerated: int
    duplicates: Listed
    width: Spread
    height: Spread
    small: Listed
    cut: Spread
    sizes: list[Size]
    left_out: int
    captions: Captions | None
    classes: dict[str, int] | None

    @property
    def usable(self) -> bool:
        """Whether a run takes the dataset as it is."""
        return self.broken.count <= self.tolerated


def make_report(
    task: Task[TrainConfig], spec: PipelineSpec, found: Examination, sizes: Sequence[tuple[int, int]], left_out: int
) -> Report:
    """Say what an examination found.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        found: What the examples showed, of which at least one can be used.
        sizes: Height and width that each of these is trained at.
        left_out: Number of them that an epoch leaves out.
    """
    config, good = task.config, found.good
    transform = task.make_transform(spec)
    trained, small = Counter[str](), []
    for one, (width, height), (rows, columns) in zip(good, found.sizes.tolist(), sizes, strict=True):
        trained[shown_size((rows, columns))] += found.times[one.name]
        if width < columns or height < rows:
            small.append((one.name, shown_size((height, width))))
    cut = [_cut_off(transform, size, to) for size, to in zip(found.sizes.tolist(), sizes, strict=True)]
    return Report(
        task=task.name,
        data={name: value for name, mark, value in named_inputs(config) if mark is not Reads.MODEL},
        examples=found.examples,
        inspected=sum(found.times.values()),
        pictures=len(good),
        broken=Listed.of([(one.name, str(one.reason)) for one in found.broken]),
        tolerated=max_bad_examples(found.examples) if config.skip_bad_images else 0,
        duplicates=Listed.of([(equal[0], ", ".join(equal[1 : _LISTED + 1])) for equal in found.duplicates()]),
        width=Spread.of(found.sizes[:, 0]),
        height=Spread.of(found.sizes[:, 1]),
        small=Listed.of(small),
        cut=Spread.of(cut),
        sizes=[Size(size, count) for size, count in sorted(trained.items(), key=lambda item: -item[1])],
        left_out=left_out,
        captions=_captions(spec, found) if task.checks_captions else None,
        classes=_classes(spec.classes, found) if spec.classes else None,
    )


def sizes_of(task: Task[TrainConfig], spec: PipelineSpec, found: Examination) -> tuple[list[tuple[int, int]], int]:
    """Return height and width that each good picture is trained at, and how many pictures an epoch leaves out.

    They are divided over buckets as a run on one device divides them.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        found: What the examples showed.

    Raises:
        UserError: If they cannot be divided.
    """
    config, count = task.config, len(found.good)
    if not config.bucket_resolutions:
        return [(config.resolution, config.resolution)] * count, 0
    buckets = bucketing.parse_sizes(config.bucket_resolutions, config.resolution, spec.size_factor)
    step = make_schedule(config, found.examples, 1).step_examples
    members = bucketing.divide(found.sizes, buckets, step)
    own = {int(place): size for size, places in zip(buckets, members, strict=True) for place in places}
    return [own[place] for place in range(count)], sum(len(places) % step for places in members)


def _cut_off(transform: ImageTransform, size: Sequence[int], target: tuple[int, int]) -> float:
    """Return the share of a picture of a width and height that is cut off for a target of a height and width."""
    if transform.resize_mode == "stretch":
        return 0.0
    shape, wanted = size[0] / size[1], target[1] / target[0]
    return 1 - min(shape, wanted) / max(shape, wanted)


def _captions(spec: PipelineSpec, found: Examination) -> Captions:
    told = [(one.name, caption) for one in found.good for caption in one.captions]
    tokens = [caption.tokens for _, caption in told if caption.tokens is not None]
    times = Counter(caption.text for _, caption in told if caption.text)
    repeated = [(text, f"{count} times") for text, count in times.most_common() if count > 1]
    return Captions(
        count=len(told),
        empty=Listed.of([(name, "") for name, caption in told if not caption.text]),
        repeated=Listed.of(repeated),
        tokens=Spread.of(tokens) if tokens else None,
        limit=None if spec.tokenize is None else spec.tokenize.length,
        cut_off=Listed.of([(name, caption.rest) for name, caption in told if caption.rest]),
    )


def _classes(names: Sequence[str], found: Examination) -> dict[str, int]:
    counts = Counter(one.label for one in found.good)
    return {name: counts[number] for number, name in enumerate(names)}


def as_text(report: Report) -> str:
    """Return the report as text for a terminal, in lines of at most 100 characters where names are short."""
    lines = [f"{report.task}: {', '.join(f'{value} (--{name})' for name, value in report.data.items())}", ""]
    of = "" if report.inspected == report.examples else f", of which {report.inspected} were looked at"
    lines += [f"{'examples':18} {report.examples}{of}", f"{'pictures':18} {report.pictures}"]
    lines += [f"{'width, pixels':18} {report.width}", f"{'height, pixels':18} {report.height}"]
    lines += [f"{'trained at':18} " + ", ".join(f"{one.size} ({one.pictures})" for one in report.sizes)]
    if report.left_out:
        lines += [f"{'left out':18} {report.left_out} in an epoch, so that each step has pictures of one size"]
    lines += [f"{'cut off':18} {report.cut.median:.0%} of a picture (median), {report.cut.most:.0%} at most"]
    if report.classes is not None:
        fewest, most = min(report.classes.values()), max(report.classes.values())
        lines += [f"{'classes':18} {len(report.classes)}, with {fewest} to {most} pictures"]
    if report.captions is not None:
        lines += [f"{'captions':18} {report.captions.count}"]
        if report.captions.tokens is not None:
            lines += [f"{'tokens':18} {report.captions.tokens}; {report.captions.limit} are seen"]
    lines += [""]
    for title, listed in findings(report):
        if listed.count:
            shown = [": ".join(filter(None, pair)) for pair in listed.first[:_LISTED_IN_TEXT]]
            more = ["…"] if listed.count > _LISTED_IN_TEXT else []
            lines += [f"{listed.count} {title}", *(f"  {line}" for line in shown + more)]
    lines += [verdict(report)]
    return "\n".join(lines) + "\n"


def findings(report: Report) -> list[tuple[str, Listed]]:
    """Return what a person may want to mend, with what is said of its number, the worst first."""
    found = [
        ("cannot be used", report.broken),
        ("have the same bytes as others", report.duplicates),
        ("are smaller than the size that they are trained at, and are enlarged", report.small),
    ]
    if report.captions is not None:
        found += [
            ("have an empty caption", report.captions.empty),
            ("have a caption of which the end is not seen", report.captions.cut_off),
            ("captions occur several times", report.captions.repeated),
        ]
    return found


def verdict(report: Report) -> str:
    """Return a sentence that says whether a run takes the dataset as it is."""
    if report.usable:
        return "A run takes these data as they are."
    fix = "mend or remove what cannot be used"
    if report.broken.count <= max_bad_examples(report.examples):
        fix += ", or add --skip_bad_images"
    return f"A run would not take these data: {fix}."
