"""Write a run as one self-contained HTML page: settings, tables, and plots as embedded SVG."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any, Literal

from loopserve.bench.figures import figure, label_ends, per_cent, series_style, svg
from loopserve.bench.quality.records import Record, Run, turns
from loopserve.bench.quality.summary import summarise
from loopserve.bench.quality.tables import Table, tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1em 0; }
figure svg { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
.note, figcaption { color: #555; font-size: 13px; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12px; }
"""
Cost = Literal["attended_fraction", "kv_share", "kv_share_with_observation"]
_COSTS: Mapping[Cost, str] = {
    "attended_fraction": "KV pairs attended, of dense's",
    "kv_share": "KV bytes read per output token, of dense's",
    "kv_share_with_observation": "KV bytes read per output token, observation included, of dense's",
}
_ACROSS = 2  # panels side by side: a page of 1,280 pixels holds no more legible ones
_SHARES = frozenset({"coverage_realised", "prefill_tile_density", "score"})
_SWEPT: Mapping[str, str] = {
    "coverage_realised": "realised coverage",
    "prefill_tile_density": "tiles computed",
    "score": "score",
    "ttft_ms": "TTFT, ms",
}


def described(run: Run) -> list[str]:
    """Return the settings and the machine of a run in a few lines."""
    suite, model, settings, last = (*(run.identity[key] for key in ("suite", "model", "settings")), run.sessions[-1])
    limit = "all dialogues" if settings["limit"] is None else f"at most {settings['limit']} dialogues a task"
    lines = [
        f"Suite {suite['name']} ({', '.join(suite['tasks'])}), {limit}, seed {settings['seed']}, {settings['history']} history.",
        f"Model {model['name']} ({model['digest']}), {model['dtype']} on {last['device']}, {last['threads']} thread(s).",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in last["versions"].items()) + ".",
        "Metrics: "
        + ", ".join(f"{name} {version or 'not installed'}" for name, version in run.identity["metrics"].items())
        + ".",
    ]
    lines += [f"{task}: {line}" for task, found in suite["found"].items() for line in found]
    if len({json.dumps([each["device"], each["versions"], each["commit"]]) for each in run.sessions}) > 1:
        lines.append("The run was resumed on another machine or with other versions: the manifest has all of them.")
    return lines


def markdown(run: Run, by: Sequence[str] = ()) -> str:
    """Return the tables as Markdown."""
    heading = "\n".join(f"- {line}" for line in described(run))
    return "\n\n".join([heading, *(table.markdown() for table in tables(run, by))]) + "\n"


def page(run: Run, by: Sequence[str] = ()) -> str:
    """Return the whole page. Without matplotlib it has a notice in place of the"""
    name = html.escape(f"{run.identity['suite']['name']}: {run.identity['model']['name']}")
    parts = [f"<h1>{name}</h1>", "<p>" + "<br>".join(html.escape(line) for line in described(run)) + "</p>"]
    parts += [_table(table) for table in tables(run, by)]
    if find_spec("matplotlib") is None:
        parts.append("<p>There are no plots: they need matplotlib (pip install 'loopserve[plot]').</p>")
    else:
        parts += [_figure(drawn, number, caption) for number, (caption, drawn) in enumerate(_plots(run), 1)]
    stacks = html.escape(json.dumps(run.identity["stacks"], indent=1, ensure_ascii=False))
    parts.append(f"<h2>Stacks</h2><pre>{stacks}</pre>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _plots(run: Run) -> Iterator[tuple[str, Any]]:
    asked = list(turns(run.records))
    if not asked:
        return
    by_place = summarise(asked, "family", "stack", "position")
    costs: tuple[tuple[str, Cost], ...] = (
        ("Score against KV pairs attended", "attended_fraction"),
        ("Score against KV bytes read per output token, scoring and summaries included", "kv_share"),
    )
    for caption, cost in costs:
        if any(row[cost] is not None for row in by_place):
            yield f"{caption}, by position of the question.", score_by_cost(by_place, cost)
    by_turn = summarise(asked, "stack", "turn")
    yield "Score by turn.", score_by_turn(by_turn)
    yield "Time to first token by turn.", ttft_by_turn(by_turn)
    if swept := _alphas(run, summarise(asked, "stack")):
        yield "What alpha gives and costs.", sweep(swept, "alpha")
    for stack in run.stacks:
        if cells := _cells(run.of_stack(stack)):
            caption = f"{stack}: share of the causal cells that each head's lines or blocks compute, mean over turns."
            yield caption, head_map(cells, stack, "cells computed")


def _alphas(run: Run, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of stacks that differ only in their prefill's alpha, each with its value; ``family`` is the policy's name."""
    swept: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        stack = run.identity["stacks"][row["stack"]]
        prefill = stack["described"]["prefill"]
        if "alpha" in prefill:
            rest = {
                key: value for key, value in stack["described"].items() if key not in ("name", "description", "prefill")
            }
            others = [{**prefill, "alpha": None}, rest, stack.get("share")]  # all other options must be equal
            alike = swept.setdefault(json.dumps(others, sort_keys=True), [])
            alike.append(row | {"alpha": prefill["alpha"], "family": prefill["policy"]})
    return [row for own in swept.values() if len({each["alpha"] for each in own}) > 1 for row in own]


def _cells(records: Sequence[dict[str, Any]]) -> list[list[float | None]]:
    """Return the mean share of computed cells by layer and head; empty if every turn was dense."""
    tables = [found for record in records if (found := record.get("cells_by_head"))]
    layers = sorted({int(layer) for found in tables for layer in found})
    means = []
    for layer in layers:
        rows = [found[str(layer)] for found in tables if str(layer) in found]
        known = [[value for value in head if value is not None] for head in zip(*rows, strict=True)]
        means.append([fmean(values) if values else None for values in known])
    return means if any(value is not None and value < 1 for row in means for value in row) else []


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    rows = f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>' if table.rows else ""
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2>{rows}{note}"


def _figure(drawn: Any, number: int, caption: str) -> str:
    return f"<figure>{svg(drawn, f'figure{number}')}<figcaption>{html.escape(caption)}</figcaption></figure>"


def score_by_cost(rows: Sequence[Record], cost: Cost) -> Any:
    """Draw a panel per question position and a line per policy through its budgets; dense is the dashed line.

    rows: of ``summarise(records, "family", "stack", "position")``; rows without position get a panel of their own.
    """
    positions = list(dict.fromkeys(row["position"] for row in rows))
    families = list(dict.fromkeys(row["family"] for row in rows))
    drawn, panels = _panels(len(positions), 5.4, 4.2)
    for axes, position in zip(panels, positions, strict=True):
        for number, family in enumerate(families):
            own = [
                row for row in rows if (row["family"], row["position"]) == (family, position) and row[cost] is not None
            ]
            if own and all(row[cost] >= 0.9995 for row in own):  # dense attends to every pair: a horizontal line
                axes.axhline(own[0]["score"], color="black", linestyle=(0, (1, 2)), linewidth=1, label=family)
            elif own:
                _errors(axes, sorted(own, key=lambda row: row[cost]), lambda row: row[cost], family, number)
        axes.set(xlabel=_COSTS[cost], title=f"question at {position}" if position else "all questions")
        axes.set_xlim(left=0)
        axes.xaxis.label.set_fontsize(8)
        axes.set(ylabel="score", ylim=(-0.02, 1.02))
        per_cent(axes.xaxis, axes.yaxis)
        _finish(axes)
    return drawn


def score_by_turn(rows: Sequence[Record]) -> Any:
    """Draw a line per stack. rows: of ``summarise(records, "stack", "turn")``."""
    drawn = figure(6.5, 4.4)
    axes = drawn.subplots()
    for number, (stack, own) in enumerate(_by(rows, "stack").items()):
        _errors(axes, own, lambda row: row["turn"] + 1, stack, number)
    axes.set(ylabel="score", ylim=(-0.02, 1.02))
    per_cent(axes.yaxis)
    _turns(axes, rows)
    return drawn


def ttft_by_turn(rows: Sequence[Record]) -> Any:
    """Draw a line of medians per stack. rows: of ``summarise(records, "stack", "turn")``."""
    drawn = figure(6.5, 4.4)
    axes = drawn.subplots()
    for number, (stack, own) in enumerate(_by(rows, "stack").items()):
        axes.plot(
            [row["turn"] + 1 for row in own], [row["ttft_ms"] for row in own], **series_style(number), label=stack
        )
    axes.set(ylabel="TTFT, ms")
    axes.set_ylim(bottom=0)
    _turns(axes, rows)
    return drawn


def sweep(rows: Sequence[Record], setting: str, by: str = "family") -> Any:
    """Plot coverage, density, score and TTFT against a setting such as alpha: one panel each, one line per ``by``.

    rows: of ``summarise``, each with the setting's value under its name. Panels without figures are omitted.
    """
    shown = [name for name in _SWEPT if any(row.get(name) is not None for row in rows)]
    drawn, panels = _panels(len(shown), 5.4, 3.8)
    for axes, name in zip(panels, shown, strict=True):
        for number, (label, own) in enumerate(_by(rows, by).items()):
            known = sorted((row for row in own if row.get(name) is not None), key=lambda row: row[setting])
            if name == "score":
                _errors(axes, known, lambda row: row[setting], label, number)
            else:
                axes.plot(
                    [row[setting] for row in known], [row[name] for row in known], **series_style(number), label=label
                )
        axes.set(xlabel=setting, title=_SWEPT[name])
        if name in _SHARES:
            per_cent(axes.yaxis)
        _finish(axes)
    return drawn


def _errors(axes: Any, rows: Sequence[Record], place: Callable[[Record], float], label: str, number: int) -> None:
    """Draw a line, with standard errors where they are known."""
    spread = [row["score_se"] or 0.0 for row in rows]
    axes.errorbar(
        [place(row) for row in rows],
        [row["score"] for row in rows],
        spread,
        **series_style(number),
        capsize=2,
        label=label,
    )


def _panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return a figure with that many panels, two side by side, each of the given size in inches."""
    across = min(count, _ACROSS)
    down = -(-count // across)
    drawn = figure(width * across, height * down)
    panels = list(drawn.subplots(down, across, squeeze=False).flatten())
    for axes in panels[count:]:
        axes.set_axis_off()
    return drawn, panels[:count]


def _turns(axes: Any, rows: Iterable[Record]) -> None:
    axes.set(xlabel="turn", xticks=sorted({row["turn"] + 1 for row in rows}))
    _finish(axes)


def _finish(axes: Any) -> None:
    """Add the grid and the labels, after all lines are drawn and the limits are set."""
    axes.grid(alpha=0.3)
    label_ends(axes)


def _by(rows: Iterable[Record], name: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def head_map(values: Sequence[Sequence[float | None]], title: str, label: str) -> Any:
    """Draw a cell per layer (row) and head (column) with its share as text.

    label: meaning of the colours. None leaves a cell empty.
    """
    layers, heads = len(values), max(len(row) for row in values)
    numbers = [[float("nan") if value is None else value for value in row] for row in values]
    drawn = figure(1.6 + 0.62 * heads, 1.4 + 0.5 * layers)
    axes = drawn.subplots()
    image = axes.imshow(numbers, aspect="auto", cmap="viridis")
    low, high = image.get_clim()
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            if value is not None:
                dark = value < (low + high) / 2
                axes.text(
                    head,
                    layer,
                    f"{100 * value:.0f} %",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
    axes.set(title=title, xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(layers))
    per_cent(drawn.colorbar(image, label=label).ax.yaxis)
    return drawn
