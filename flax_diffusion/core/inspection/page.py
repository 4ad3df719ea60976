"""The report as a page: one HTML file, which needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from flax_diffusion.core.inspection.report import Listed, Report, findings, verdict
from flax_diffusion.core.io.sheets import enlarge, to_pillow

_LEAST_SIDE = 96  # pixels of the longer side of a shown picture

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #3a6ea5; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --accent: #8ab4e8; --bad: #f2b8b5; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } caption { text-align: left; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { width: 40%; } td.bar div { background: var(--accent); height: .8rem; border-radius: .2rem; }
.verdict { border-left: .3rem solid var(--accent); padding: .25rem .75rem; } .verdict.bad { border-color: var(--bad); }
.sheet { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); padding: 0; }
figure { margin: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; }
img { width: 100%; height: auto; display: block; }
"""


@dataclass(frozen=True)
class Shown:
    """A picture as the model is given it.

    Attributes:
        name: Its name.
        pixels: Its pixels, uint8 (H, W, 1 or 3).
        said: Its caption or its class; "" for none.
    """

    name: str
    pixels: np.ndarray
    said: str


def as_page(report: Report, sheet: Sequence[Shown]) -> str:
    """Return the report as an HTML page.

    Args:
        report: What was found.
        sheet: Pictures as the model is given them.
    """
    title, kind = f"Data of {escape(report.task)}", "verdict" if report.usable else "verdict bad"
    parts = [f'<h1>{title}</h1><p class="{kind}">{verdict(report)}</p>', _section("Counts", _table(_counts(report)))]
    for title, listed in findings(report):
        if listed.count:
            parts.append(_section(f"{listed.count} {title}", _list(listed)))
    parts.append(_section("Sizes", _bars("Size", [(one.size, one.pictures) for one in report.sizes])))
    if report.classes is not None:
        parts.append(_section("Classes", _bars("Class", list(report.classes.items()))))
    parts.append(_section("As the model is given them", _sheet(sheet)))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _counts(report: Report) -> Iterable[tuple[str, str]]:
    """Yield a row for each number of the report."""
    for name, value in report.data.items():
        yield f"--{name}", value
    yield "examples in an epoch", str(report.examples)
    if report.inspected != report.examples:
        yield "examples that were looked at", str(report.inspected)
    yield "pictures", str(report.pictures)
    yield "width in pixels", str(report.width)
    yield "height in pixels", str(report.height)
    yield "share that is cut off", f"median {report.cut.median:.0%}, {report.cut.most:.0%} at most"
    if report.left_out:
        yield "left out in an epoch, so that each step has pictures of one size", str(report.left_out)
    if report.captions is not None:
        yield "captions", str(report.captions.count)
        if report.captions.tokens is not None:
            yield "tokens of a caption", f"{report.captions.tokens}; {report.captions.limit} are seen"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _list(listed: Listed) -> str:
    more = f"<p>The first {len(listed.first)} of {listed.count}.</p>" if listed.count > len(listed.first) else ""
    return _table(listed.first) + more


def _bars(head: str, counts: Sequence[tuple[str, int]]) -> str:
    """Return a table of numbers with a bar for each."""
    most = max((count for _, count in counts), default=0) or 1
    rows = (
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{count}</td>'
        f'<td class="bar" aria-hidden="true"><div style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for name, count in counts
    )
    header = f'<tr><th scope="col">{head}</th><th scope="col">Pictures</th><td></td></tr>'
    return f"<table>{header}{''.join(rows)}</table>"


def _sheet(sheet: Sequence[Shown]) -> str:
    figures = (
        f'<figure><img alt="{escape(one.said or one.name)}" src="{_address(one.pixels)}"><figcaption>{escape(one.said)}'
        f"<div><small>{escape(one.name)}</small></div></figcaption></figure>"
        for one in sheet
    )
    return f'<div class="sheet">{"".join(figures)}</div>'


def _address(pixels: np.ndarray) -> str:
    """Return a picture as an address that holds it."""
    file = io.BytesIO()
    enlarge(to_pillow(pixels), _LEAST_SIDE).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
