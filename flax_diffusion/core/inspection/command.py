"""The command that says what a dataset holds, before it is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.inspection.examination import Examination, examine
from flax_diffusion.core.inspection.page import Shown, as_page
from flax_diffusion.core.inspection.report import Report, make_report, sizes_of
from flax_diffusion.core.io.files import as_path, write_text
from flax_diffusion.core.io.sheets import contact_sheet, save_picture
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task

JSON_FILE, PAGE_FILE, SHEET_FILE = "data.json", "data.html", "contact_sheet.png"  # a run has a report.html


def inspect(task: Task[TrainConfig], *, report_dir: str | None, limit: int | None, sheet: int) -> Report:
    """Look at the data of a run.

    Args:
        task: The task, with the run's options.
        report_dir: Folder for the report as JSON and as a page, and for a contact sheet; None to write nothing.
        limit: Largest number of examples to look at; None for all.
        sheet: Number of pictures to show as the model is given them.

    Raises:
        UserError: If the data or the models' configs cannot be opened, if no picture can be used, or if the folder
            cannot be written.
    """
    for name, value in {"limit": limit, "sheet": sheet}.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    folder = None if report_dir is None else as_path(report_dir)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--report_dir {folder}: cannot be made ({error.strerror}); name another") from error
    source = task.open_pictures()
    spec = task.make_spec(source)
    found = examine(source, spec.tokenize if task.checks_captions else None, limit)
    if not found.good:
        raise DataError(f"none of {len(found.seen)} pictures can be used. The first: {found.broken[0].reason}")
    sizes, left_out = sizes_of(task, spec, found)
    report = make_report(task, spec, found, sizes, left_out)
    if folder is not None:
        shown = _shown(task, spec, source, found, sizes, sheet)
        write_text(folder / JSON_FILE, json.dumps(asdict(report) | {"usable": report.usable}, indent=2) + "\n")
        write_text(folder / PAGE_FILE, as_page(report, shown))
        said = [one.said or one.name for one in shown]
        save_picture(contact_sheet([one.pixels for one in shown], captions=said), folder / SHEET_FILE)
    return report


def _shown(
    task: Task[TrainConfig],
    spec: PipelineSpec,
    source: Source,
    found: Examination,
    sizes: Sequence[tuple[int, int]],
    count: int,
) -> list[Shown]:
    """Return evenly spaced pictures as the model is given them in the first epoch, with captions or class."""
    make = task.make_example_fn(spec)
    shown = []
    for place in np.unique(np.linspace(0, len(sizes) - 1, min(count, len(sizes))).astype(int)):
        one = found.good[place]
        size = sizes[place] if task.config.bucket_resolutions else None
        example = make(source, task.config.seed, 0, one.index, size)
        pixels = np.rint((example["pixel_values"] + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
        said = " / ".join(caption.text for caption in one.captions)
        shown.append(Shown(one.name, pixels, said if one.label is None else spec.classes[one.label]))
    return shown
