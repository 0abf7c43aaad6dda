"""Write a run as one self-contained HTML page: settings, tables, and plots as embedded SVG."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from loopserve.bench.figures import svg
from loopserve.bench.quality import plots
from loopserve.bench.quality.records import turns
from loopserve.bench.quality.run import Run
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
    """Return the whole page. Without matplotlib it has a notice in place of the plots."""
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
    costs: tuple[tuple[str, plots.Cost], ...] = (
        ("Score against KV pairs attended", "attended_fraction"),
        ("Score against KV bytes read per output token, scoring and summaries included", "kv_share"),
    )
    for caption, cost in costs:
        if any(row[cost] is not None for row in by_place):
            yield f"{caption}, by position of the question.", plots.score_by_cost(by_place, cost)
    by_turn = summarise(asked, "stack", "turn")
    yield "Score by turn.", plots.score_by_turn(by_turn)
    yield "Time to first token by turn.", plots.ttft_by_turn(by_turn)
    if swept := _alphas(run, summarise(asked, "stack")):
        yield "What alpha gives and costs.", plots.sweep(swept, "alpha")
    for stack in run.stacks:
        if cells := _cells(run.of_stack(stack)):
            caption = f"{stack}: share of the causal cells that each head's lines or blocks compute, mean over turns."
            yield caption, plots.head_map(cells, stack, "cells computed")


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
