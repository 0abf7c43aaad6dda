"""Write tables of rows that ``benchmarks/peers`` measured: other engines beside loopserve, and servers beside ``loopserve serve``.

No speed is shown for what answers differently from dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from statistics import median
from typing import Any

from loopserve.bench.rows import Row

TIE = 0.5
"""Largest gap, in natural log probability, at which dense attention's choice between two tokens is left to rounding.

Weights of 8 bits under dense attention were seen to turn a choice with a gap of 0.39.
"""

COLUMNS = (
    "peer",
    "threads",
    "first answer",
    "first turn, s",
    "ms per token",
    "later answer",
    "later turn, s",
    "peak MiB",
    "rounds",
)
SERVER_COLUMNS = ("server", "completed", "tokens/s", "TTFT p50 / p99, ms", "ITL p50 / p99, ms", "cached", "rounds")


def newest(rows: Iterable[Row], op: str) -> list[Row]:
    """Return the rows of an operation that were measured at the commit of the last of them."""
    found = [row for row in rows if row["op"] == op]
    return [row for row in found if row["commit"] == found[-1]["commit"]]


def peers_markdown(rows: Iterable[Row]) -> str:
    """Return a Markdown table per kind of conversation, with a line per peer and number of threads."""
    shown = newest(rows, "peer")
    if not shown:
        return "No rows."
    parts = []
    for case, of_case in _grouped(shown, _case):
        lines = [f"{_title(case)}:", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        for (peer, threads), runs in _grouped(of_case, lambda row: (row["peer"], row["threads"])):
            lines.append(f"| {peer} | {threads} | {' | '.join(_cells(runs))} |")
        parts.append("\n".join(lines))
    outputs, new = shown[-1]["outputs"], shown[-1]["new"]
    parts.append(
        f"Medians, wall time and in brackets processor time of all threads; {outputs} tokens a turn, "
        f"{new} new ones in the later turn; interleaved rounds. {_conditions(shown)}."
    )
    return "\n\n".join(parts)


def _cells(runs: Sequence[Row]) -> tuple[str, ...]:
    errors = [row["error"] for row in runs if "error" in row]
    measured = [row for row in runs if "error" not in row]
    if not measured:
        return (_failed(errors[0]), "-", "-", "-", "-", "-", "0")
    outputs = measured[0]["outputs"]
    first, later = ([row[turn] for row in measured] for turn in ("first", "later"))
    return (
        _answers(first, outputs),
        _time(first, "ttft", 1),
        _time(first, "token", 1000),
        _answers(later, outputs),
        _time(later, "ttft", 1),
        f"{median(row['peak_mib'] for row in measured):,.0f}",
        f"{len(measured)}" + (f", {len(errors)} failed" if errors else ""),
    )


def _answers(turns: Sequence[Row], outputs: int) -> str:
    """Return how the worst of all rounds' answers compares with dense attention's."""
    if errors := [each["error"] for each in turns if "error" in each]:
        return _failed(errors[0])
    worst = min(turns, key=lambda turn: (turn["agrees"], turn["same_tokens"]))
    if worst["same_tokens"] == outputs:
        return "same"
    if worst["agrees"]:
        return f"same but for rounding (gap {worst['gap']:.2f})"
    return f"differs after {worst['same_tokens']} of {outputs}"


def _time(turns: Sequence[Row], name: str, scale: int) -> str:
    """Return wall and processor time, or nothing if the answer of a round differs or was not given."""
    if not all(each.get("agrees") for each in turns):
        return "-"
    wall, cpu = (median(each[f"{name}_{clock}s"] for each in turns) * scale for clock in ("", "cpu_"))
    return f"{_number(wall)} ({_number(cpu)})"


def _failed(error: str) -> str:
    """Return an error as a cell of a table."""
    return "failed: " + " ".join(error.replace("|", "/").split())[:120]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _case(row: Row) -> tuple[str, int, int]:
    return row["model"], row["prompt"], row["conversations"]


def _title(case: tuple[str, int, int]) -> str:
    model, prompt, conversations = case
    name = "random weights, 12 layers, 768 wide" if model == "random" else model
    return f"{name}, {prompt:,} tokens" + (f", {conversations} conversations at once" if conversations > 1 else "")


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> Iterable[tuple[Any, list[Row]]]:
    """Yield groups in the order of their first row."""
    order = list(dict.fromkeys(map(key, rows)))
    for found, group in groupby(sorted(rows, key=lambda row: order.index(key(row))), key=key):
        yield found, list(group)


def servers_markdown(rows: Iterable[Row]) -> str:
    """Return a Markdown table with a line per server."""
    shown = newest(rows, "serve")
    if not shown:
        return "No rows."
    lines = [f"| {' | '.join(SERVER_COLUMNS)} |", "|" + "---|" * len(SERVER_COLUMNS)]
    for server, runs in _grouped(shown, lambda row: row["server"]):
        lines.append(f"| {server} | {' | '.join(_server_cells(runs))} |")
    load = shown[-1]["load"]
    caption = (
        f"{load['conversations']} conversations at once, {load['turns']} turns each, answers of at most "
        f"{load['output_tokens']} tokens; medians. {_conditions(shown)}."
    )
    return "\n".join([*lines, "", caption])


def _server_cells(runs: Sequence[Row]) -> tuple[str, ...]:
    measured = [row for row in runs if "error" not in row]
    if not measured:
        return (_failed(runs[-1]["error"]), "-", "-", "-", "-", "0")

    def middle(name: str) -> str:
        values = [row["figures"][name] for row in measured if row["figures"][name] is not None]
        return _number(median(values)) if values else "-"

    done, failed = (sum(row["figures"][name] for row in measured) for name in ("completed", "failed"))
    cached = median(row["figures"]["cached_share"] for row in measured)
    return (
        f"{done} of {done + failed}",
        middle("output_throughput"),
        f"{middle('p50_ttft_ms')} / {middle('p99_ttft_ms')}",
        f"{middle('p50_itl_ms')} / {middle('p99_itl_ms')}",
        f"{cached:.0%}",
        str(len(measured)),
    )


def _conditions(rows: Sequence[Row]) -> str:
    """Return device, versions, commit and days."""
    versions: dict[str, None] = {}
    for row in rows:
        for package, version in row["versions"].items():
            versions[f"{package} {version}"] = None
    devices, days = (dict.fromkeys(values) for values in ((r["device"] for r in rows), (r["date"][:10] for r in rows)))
    return f"{', '.join(devices)}; {', '.join(versions)}; commit {rows[-1]['commit']}; {', '.join(days)}"
