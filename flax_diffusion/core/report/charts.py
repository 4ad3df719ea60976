"""The charts of a page: a place for each, in which its script draws, and the values as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from flax_diffusion.core.report.curves import Curve
from flax_diffusion.core.report.reading import Run

_TRAIN = "train/"
_FIRST = ("train/loss", "validation_loss", "validation_loss_ema")
_TITLES = {
    "train/loss": "Loss", "train/learning_rate": "Learning rate", "train/grad_norm": "Gradient norm",
    "train/images_per_second": "Pictures per second", "validation_loss": "Validation loss",
    "validation_loss_ema": "Validation loss with the moving average", "fid": "FID", "kid": "KID",
    "train/instance_loss": "Loss on the new thing", "train/prior_loss": "Loss on its class",
    "train/reconstruction_loss": "Reconstruction loss", "train/kl_loss": "KL loss", "train/mfu": "MFU",
    "train/data_wait_seconds": "Wait for data, in seconds", "train/device_memory_gib": "Device memory, in GiB",
}  # fmt: skip
_ROWS = 24  # of a chart's table
_TAIL = 100  # steps whose mean is the last value of training


def letter(number: int) -> str:
    """Return the letter of a run in a comparison, by its number from 0: A to Z, then A1, B1, …."""
    return chr(ord("A") + number % 26) + (str(number // 26) if number >= 26 else "")


def lettered(runs: Sequence[Run]) -> list[str]:
    """Return the names of runs in a comparison, with their letters."""
    return [f"{letter(number)}: {run.name}" for number, run in enumerate(runs)]


def title_of(name: str) -> str:
    """Return the title of the chart of a curve."""
    plain = name.removeprefix(_TRAIN).replace("_", " ")
    return _TITLES.get(name, plain[:1].upper() + plain[1:])


def chart_names(runs: Sequence[Run]) -> list[str]:
    """Return the names of all curves: the losses first, then other values by which runs are judged, then the rest."""
    names = dict.fromkeys(name for run in runs for name, curve in run.kept.curves.items() if curve.last_step)

    def rank(name: str) -> tuple[int, int]:
        known = list(_TITLES)
        return (
            _FIRST.index(name) if name in _FIRST else len(_FIRST) + name.startswith(_TRAIN),
            known.index(name) if name in known else len(known),
        )

    return sorted(names, key=rank)


def charts(runs: Sequence[Run]) -> str:
    """Return the charts of all curves, with the switches above them."""
    names = chart_names(runs)
    if not names:
        return ""
    switches = (
        '<div class="switches"><label><input type="checkbox" id="log"> Logarithmic scale of losses and norms</label>'
        '<label for="smooth">Smoothing</label><input type="range" id="smooth" min="0" max="0.99" step="0.01" '
        'value="0.9"><output for="smooth" id="smoothing">0.90</output></div>'
        "<noscript><p>The curves are drawn by JavaScript. Their values are in the tables below.</p></noscript>"
    )
    band = "" if len(runs) > 1 else " The light band is from the least to the largest value of neighbouring steps."
    help_text = (
        f'<p class="hint">The thick line is smoothed, the thin one is not.{band} ▼ marks values that are not finite. '
        "Point at a chart, or go to it by Tab and use the arrow keys, to read values.</p>"
    )
    return f'{switches}{help_text}<div class="charts">{"".join(_chart(name, runs) for name in names)}</div>'


def _chart(name: str, runs: Sequence[Run]) -> str:
    """Return the place of a chart, with a table of some of its values."""
    title = escape(title_of(name))
    place = f'<div class="plot" data-curve="{escape(name)}"></div>'
    steps = _steps([run.kept.curves[name] for run in runs if name in run.kept.curves])
    heads = lettered(runs) if len(runs) > 1 else ["Mean", "Least", "Largest"]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("Step", *heads))
    rows = []
    for step in steps:
        cells = [cell for run in runs for cell in _cells(run.kept.curves.get(name), step, several=len(runs) > 1)]
        rows.append(f'<tr><th scope="row">{step:,}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return (
        f'<figure class="chart"><figcaption><h3>{title}</h3><p class="readout"></p></figcaption>{place}<details>'
        f'<summary>{title} as a table</summary><div class="wide" tabindex="0" role="group" aria-label="Table: {title}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details></figure>"
    )


def _steps(curves: Sequence[Curve]) -> list[int]:
    """Return the steps at which a table shows values: evenly spaced ones of those that there are, and the last."""
    steps = np.unique(np.concatenate([curve.rows[:, 0] for curve in curves]))
    places = np.unique(np.linspace(0, len(steps) - 1, min(_ROWS, len(steps))).astype(int))
    return steps[places].astype(int).tolist()


def _cells(curve: Curve | None, step: int, *, several: bool) -> list[str]:
    """Return the cells of a curve's bucket at or before a step: its mean and, of one run, its least and largest."""
    rows = np.zeros((0, 6)) if curve is None else curve.rows
    place = int(np.searchsorted(rows[:, 0], step, "right")) - 1
    if place < 0:
        return [""] if several else ["", "", ""]
    _, count, mean, low, high, _ = rows[place].tolist()
    if not count:
        return ["not finite"] if several else ["not finite", "", ""]
    return [shown(mean)] if several else [shown(mean), shown(low), shown(high)]


def shown(number: float) -> str:
    """Return a number as text with four significant digits."""
    if number and not 1e-3 <= abs(number) < 1e6:
        return f"{number:.3e}"
    return f"{number:,.{max(0, 3 - math.floor(math.log10(abs(number) or 1)))}f}"


def last_values(runs: Sequence[Run]) -> str:
    """Return a table of the last value of each curve, and for one run of its least and largest."""
    names = chart_names(runs)
    if not names:
        return ""
    several = len(runs) > 1
    heads = lettered(runs) if several else ["Last", "Least", "Largest"]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("", *heads))
    rows = []
    for name in names:
        cells = []
        for run in runs:
            curve = run.kept.curves.get(name)
            last = None if curve is None else curve.mean_of_last(_TAIL if name.startswith(_TRAIN) else 1)
            cells.append("" if last is None else shown(last))
            if not several:
                extremes = curve.rows[:, 3:5] if curve is not None and last is not None else np.zeros((0, 2))
                cells += (
                    [shown(np.nanmin(extremes[:, 0])), shown(np.nanmax(extremes[:, 1]))] if len(extremes) else [""] * 2
                )
        told = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(title_of(name))}</th>{told}</tr>')
    return (
        f"<p>The last value of what is logged in each step is the mean over the last {_TAIL} steps.</p>"
        '<div class="wide" tabindex="0" role="group" aria-label="Table: last values"><table class="numbers"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
