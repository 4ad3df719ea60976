"""The page of a run, or of several side by side: one HTML file that needs no network."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from flax_diffusion.core.report.charts import chart_names, charts, last_values, letter, lettered, title_of
from flax_diffusion.core.report.options import changed_options, differing_options, shown_path, shown_value
from flax_diffusion.core.report.pictures import Grid
from flax_diffusion.core.report.reading import Run

GENERATOR = "flax-diffusion report"
"""Mark by which a page of this program is told from other files."""

_OPEN = 4  # captions of a grid that are shown without being asked for; they are in the picture too
_STATES = {"running": "Running", "ended": "Ended", "stopped": "Stopped early", "": "Made from the files of the run"}


@functools.cache
def _resource(name: str) -> tuple[str, str]:
    """Return a file of the folder static, and its checksum as a page's security policy names it."""
    text = (importlib.resources.files("flax_diffusion.core.report") / "static" / name).read_text(encoding="utf-8")
    return text, f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def as_page(runs: Sequence[Run]) -> str:
    """Return the page of one run, or the one that compares several.

    Args:
        runs: The runs.
    """
    style, style_sum = _resource("page.css")
    script, script_sum = _resource("page.js")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [section for section in _sections(runs) if section[2]]
    links = "".join(f'<li><a href="#{name}">{escape(head)}</a></li>' for name, head, _ in sections)
    bodies = "".join(
        f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{escape(head)}</h2>{body}</section>'
        for name, head, body in sections
    )
    data = json.dumps(_data(runs), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = f"default-src 'none'; img-src data:; style-src {style_sum}; script-src {script_sum}"
    text = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">\n"
        f'<meta name="generator" content="{GENERATOR}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{style}</style></head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f"<header><h1>{escape(title)}</h1>{_head(runs)}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main id="main">{bodies}</main>\n'
        f"<footer><p>{_written(runs)}</p></footer>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body></html>\n'
    )
    return text.encode("utf-8", "replace").decode()  # a name of a file may hold what is no character


def _sections(runs: Sequence[Run]) -> Iterable[tuple[str, str, str]]:
    """Yield the name, the title and the content of each section; the content is empty where there is nothing."""
    yield "curves", "Curves", charts(runs)
    yield "values", "Values", last_values(runs)
    yield "samples", "Samples", _samples(runs)
    yield "seen", "What the model saw first", "".join(_seen(run, several=len(runs) > 1) for run in runs)
    yield "options", "Options", _options(runs[0]) if len(runs) == 1 else _differences(runs)
    yield "command", "The command that reproduces it" if len(runs) == 1 else "Commands", _commands(runs)
    environments = [run.kept.facts.get("environment", {}) for run in runs]
    names = dict.fromkeys(name for one in environments for name in one)
    rows = [(name, [str(one.get(name, "")) for one in environments]) for name in names]
    yield "environment", "Environment", table("Package", rows, runs) if rows else ""


def table(
    head: str, rows: Iterable[tuple[str, Sequence[str]]], runs: Sequence[Run], columns: Sequence[str] = ()
) -> str:
    """Return a table of texts.

    Args:
        head: Title of the first column.
        rows: The first cell of each row, and its others.
        runs: The runs whose letters and names are the titles of the other columns, if there are several.
        columns: These titles; empty for those, or of one run for "Value".
    """
    titles = columns or (lettered(runs) if len(runs) > 1 else ["Value"])
    heads = "".join(f'<th scope="col">{escape(title)}</th>' for title in (head, *titles))
    cells = (
        f'<tr><th scope="row">{_broken(name)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for name, values in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="Table: {escape(head)}"><table><thead><tr>{heads}</tr>'
        f"</thead><tbody>{''.join(cells)}</tbody></table></div>"
    )


def _broken(name: str) -> str:
    """Return the name of an option, or another text, with places where a narrow screen may break the line."""
    first, *words = escape(name).split("_")
    return f'<span class="whole">{first}</span>' + "".join(f"_<wbr>{word}" for word in words)


def _head(runs: Sequence[Run]) -> str:
    """Return what is said of the runs at the top of the page."""
    if len(runs) > 1:
        items = [
            f'<li><svg class="key run-{n % 6} dash-{(n + n // 6) % 6}" viewBox="0 0 40 10" aria-hidden="true">'
            f'<path d="M0 5H40"/></svg> <b>{letter(n)}</b> {escape(run.name)}: {escape(_state(run))}</li>'
            for n, run in enumerate(runs)
        ]
        return f'<ul class="keys">{"".join(items)}</ul>'
    (run,) = runs
    facts = run.kept.facts
    rows = [("Task", facts.get("task", "")), ("Model", facts.get("model", ""))]
    if "parameters" in facts:
        said = f"{facts['parameters']:,} train, {facts['frozen']:,} stay as they are"
        rows += [("Parameters", said), ("Devices", facts["devices"]), ("Pictures per step", f"{facts['batch']:,}")]
        rows += [("Time", _duration(facts["seconds"]))] if "seconds" in facts else []
    told = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in rows if value)
    state = str(facts.get("state", ""))
    return f'<p class="state {escape(state)}">{escape(_state(run))}</p>{_progress(run)}<dl class="facts">{told}</dl>'


def _state(run: Run) -> str:
    facts = run.kept.facts
    state = _STATES.get(str(facts.get("state", "")), "Made from the files of the run")
    step = facts.get("step") or max((curve.last_step for curve in run.kept.curves.values()), default=0)
    total = f" of {facts['total']:,}" if "total" in facts else ""
    when = f", as of {_when(facts['updated'])}" if "updated" in facts and facts.get("state") == "running" else ""
    return f"{state}: step {step:,}{total}{when}"


def _progress(run: Run) -> str:
    facts = run.kept.facts
    if facts.get("state") != "running" or "total" not in facts:
        return ""
    return f'<progress max="{int(facts["total"])}" value="{int(facts["step"])}" aria-label="Steps taken"></progress>'


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(float(seconds), datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _samples(runs: Sequence[Run]) -> str:
    """Return the grids with the slider through them; without JavaScript the last ones are shown."""
    if not any(run.grids for run in runs):
        return ""
    steps = sorted({grid.step for run in runs for grid in run.grids})
    left_out = [run for run in runs if run.grid_count > len(run.grids)]
    notes = "".join(
        f"<p>{f'Of {escape(run.name)}: ' if len(runs) > 1 else ''}{len(run.grids)} of {run.grid_count:,} grids are "
        "here: the first, the last and evenly spaced ones between them. All are in the folder samples/.</p>"
        for run in left_out
    )
    slider = (
        '<div class="slider"><button type="button" id="previous">Previous</button><label for="step">Step</label>'
        f'<input type="range" id="step" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        f'aria-valuetext="step {steps[-1]:,}"><output for="step" id="shown">{steps[-1]:,}</output>'
        '<button type="button" id="next">Next</button></div>'
    )
    figures = "".join(_figure(runs, number) for number in range(len(runs)))
    return f'{notes}{slider if len(steps) > 1 else ""}<div class="grids">{figures}</div>'


def _figure(runs: Sequence[Run], number: int) -> str:
    """Return the figure of a run's last grid, in which the slider shows the others."""
    run = runs[number]
    of = lettered(runs)[number] if len(runs) > 1 else ""
    if not run.grids:
        return f'<figure class="grid"><figcaption><b>{escape(of)}</b> has no grids.</figcaption></figure>'
    last = run.grids[-1]
    told = "".join(f"<li>{escape(caption)}</li>" for caption in last.captions)
    told = f"<details{' open' * (len(last.captions) <= _OPEN)}><summary>Captions</summary><ol>{told}</ol></details>"
    told = told if any(grid.captions for grid in run.grids) else ""
    name = f"<b>{escape(of)}</b> " if of else ""
    return (
        f'<figure class="grid" data-run="{number}"><div class="scroll"><img alt="{escape(alt_of(last, of))}" '
        f'width="{last.size[0]}" height="{last.size[1]}" src="{last.address}"></div><figcaption>{name}'
        f'<span class="at">step {last.step:,}</span>{told}</figcaption></figure>'
    )


def alt_of(grid: Grid, of: str) -> str:
    """Return a text that stands in for a grid of samples.

    Args:
        grid: The grid.
        of: What it is of; "" for nothing to add.
    """
    count = f", {len(grid.captions)} pictures" if grid.captions else ""
    return f"{f'{of}: ' if of else ''}Samples of step {grid.step:,}{count}"


def _seen(run: Run, *, several: bool) -> str:
    """Return the pictures of the first batch of a run, with their captions."""
    if not run.kept.seen:
        return ""
    figures = []
    for one in run.kept.seen:
        caption, rest, beside = (str(one.get(name, "")) for name in ("caption", "rest", "beside"))
        seen = caption[: len(caption) - len(rest)] if rest and caption.endswith(rest) else caption
        unseen = f"<s>{escape(rest)}</s> <small>(the end is not seen)</small>" if rest else ""
        note = f"<small>At the right: {escape(beside)}.</small>" if beside else ""
        address = str(one.get("address", ""))
        picture = ""
        if address.startswith("data:image/"):
            width, height = (int(side) for side in one["size"])
            small = ' class="small"' if max(width, height) < 128 else ""
            alt = escape(caption or f"Training picture {one.get('name', '')}")
            picture = f'<img{small} alt="{alt}" width="{width}" height="{height}" src="{escape(address)}">'
        told = f"{escape(seen)}{unseen} {note}<small>{escape(str(one.get('name', '')))}</small>"
        figures.append(f"<figure>{picture}<figcaption>{told}</figcaption></figure>")
    head = f"<h3>{escape(run.name)}</h3>" if several else ""
    what = "Pictures of the first batch, after they were cut and mirrored, with what the model was told of each."
    if not any(one.get("address") for one in run.kept.seen):
        what = "What the model was told of the first batch. The run reads latents, of which there are no pictures here."
    return f'{head}<p>{what}</p><div class="sheet">{"".join(figures)}</div>'


def _options(run: Run) -> str:
    """Return the options of a run, those first that are not the defaults."""
    if not run.options:
        return ""
    changed = changed_options(str(run.kept.facts.get("task", "")), run.options)
    rows = [
        (f"--{name}", [shown_value(run.options[name]), "" if default is None else default or "required"])
        for name, default in changed.items()
    ]
    rest = [(f"--{name}", [shown_value(value)]) for name, value in run.options.items() if name not in changed]
    shown = table("Option", rows, [run], ["Value", "Default"])
    head = f"<summary>The other {len(rest)} options, with their defaults</summary>"
    return shown + (f"<details>{head}{table('Option', rest, [run])}</details>" if rest else "")


def _differences(runs: Sequence[Run]) -> str:
    """Return the options by which runs differ."""
    known = [run.options or {} for run in runs]
    rows = [
        (f"--{name}", [shown_value(one[name]) if name in one else "" for one in known])
        for name in differing_options(known)
    ]
    tasks = [str(run.kept.facts.get("task", "")) for run in runs]
    rows = ([("task", tasks)] if len(set(tasks)) > 1 else []) + rows
    if not rows:
        return "<p>The runs have the same options, but for the folder.</p>"
    return f"<p>By these options they differ.</p>{table('Option', rows, runs)}"


def _commands(runs: Sequence[Run]) -> str:
    parts = []
    for number, run in enumerate(runs):
        facts: dict[str, Any] = run.kept.facts
        if "command" not in facts:
            continue
        name = f"<h3>{escape(lettered(runs)[number])}</h3>" if len(runs) > 1 else ""
        label = f"Command of {escape(run.name)}"
        again = (
            "" if len(runs) > 1 else f"<p>The same, from the options in its folder:</p>{_code(facts['again'], label)}"
        )
        parts.append(f"{name}{_code(facts['command'], label)}{again}")
    return "".join(parts)


def _code(text: str, label: str) -> str:
    return f'<pre tabindex="0" role="group" aria-label="{label}"><code>{escape(shown_path(text))}</code></pre>'


def _written(runs: Sequence[Run]) -> str:
    """Return the line at the end: by what the page was written, and what that took of the run."""
    said = "Written by flax-diffusion"
    facts = runs[0].kept.facts
    if len(runs) > 1 or not facts.get("seconds"):
        return f"{said}."
    share = facts["upkeep"] / facts["seconds"]
    return f"{said}, last on {_when(facts['updated'])}. This page has taken {share:.1%} of the time of the run so far."


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return what the page's script needs."""
    names = chart_names(runs)
    return {
        "charts": [{"name": name, "title": title_of(name)} for name in names],
        "runs": [
            {
                "letter": letter(number),
                "curves": {name: curve.as_json() for name, curve in run.kept.curves.items()},
                "grids": [
                    {
                        "step": grid.step,
                        # The last one is on the page already.
                        "src": "" if grid is run.grids[-1] else grid.address,
                        "alt": alt_of(grid, lettered(runs)[number] if len(runs) > 1 else ""),
                        "size": grid.size,
                        "captions": grid.captions,
                    }
                    for grid in run.grids
                ],
            }
            for number, run in enumerate(runs)
        ],
    }
