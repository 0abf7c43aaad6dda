"""Draw the results of the demonstration and of speed benchmarks. matplotlib is an extra: ``pip install loopserve[plot]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from loopserve.bench.figures import COLOURS, figure, label_ends, per_cent, save, series_style
from loopserve.bench.rows import Row
from loopserve.bench.speed.table import count, crossing

_WHOLE = "sparse_prefill"  # scoring, selection and attention
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_FIRST_TURN = ("dense_attention", "vertical_slash", _WHOLE)


def plot_demo(result: dict[str, Any], path: str | Path) -> None:
    """Write an image of accuracy by turn and of the computed and attended shares of dense attention."""
    drawn = figure(10.5, 5)
    stacks: dict[str, dict[str, Any]] = result["stacks"]
    right, costs = drawn.subplots(1, 2)
    turns = len(next(iter(stacks.values()))["turns"])
    width = 0.8 / len(stacks)
    for number, (name, figures) in enumerate(stacks.items()):
        shares = [turn["right"] / turn["asked"] for turn in figures["turns"]]
        places = [turn + (number - (len(stacks) - 1) / 2) * width for turn in range(turns)]
        right.bar(places, shares, width, label=name, **_fill(number))
    right.set_xticks(range(turns), [f"turn {turn + 1}" for turn in range(turns)])
    right.set(ylabel="answers right", ylim=(0, 1.02), title="Answers")
    per_cent(right.yaxis)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    bars = {
        "prefill cells": [figures["prefill_cell_density"] for figures in stacks.values()],
        "KV pairs attended": [figures["attended_fraction"] for figures in stacks.values()],
        "KV bytes per token": [_bytes_share(figures) for figures in stacks.values()],
    }
    width = 0.8 / len(bars)
    for number, (label, values) in enumerate(bars.items()):
        places = [place + (number - 1) * width for place in range(len(stacks))]
        costs.bar(places, [value or 0.0 for value in values], width, label=label, **_fill(number))
    costs.set_xticks(range(len(stacks)), list(stacks), rotation=20)
    costs.set(ylabel="of dense", title="Cost")
    per_cent(costs.yaxis)
    costs.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    save(drawn, path)


def _fill(number: int) -> dict[str, Any]:
    """Return the fill of a series' bars. Colour and hatching each distinguish it from the others."""
    return {
        "facecolor": COLOURS[number % len(COLOURS)],
        "hatch": _HATCHES[number % len(_HATCHES)],
        "edgecolor": "white",
    }


def _bytes_share(figures: dict[str, Any]) -> float | None:
    dense = figures["dense_kv_bytes_per_token"]
    return figures["kv_bytes_per_token"] / dense if dense else None


def plot_speed(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Plot time against length, dense and sparse, and time per token against history, on logarithmic scales. Return the files."""
    made = []
    first = [
        row
        for row in rows
        if "median_ms" in row and row["op"] in _FIRST_TURN and row["shape"]["m"] == row["shape"]["n"]
    ]
    steps = [row for row in rows if "median_ms" in row and row["op"] == "decode_step" and "turn" not in row["shape"]]
    if first:
        panels = _panels(
            first, lambda row: f"{row['data'].split(',')[0]}, D {row['shape']['head_dim']}, {row['dtype']}"
        )
        for axes, group in panels:
            dense = {row["shape"]["n"]: row["sdpa_ms"] for row in group if "sdpa_ms" in row}
            axes.plot(*_line(dense), **series_style(6), label="fastest SDPA")
            for number, (op, impl) in enumerate(dict.fromkeys((row["op"], row["impl"]) for row in group)):
                own = [row for row in group if (row["op"], row["impl"]) == (op, impl)]
                times = {row["shape"]["n"]: row["median_ms"] for row in own}
                axes.plot(*_line(times), **series_style(number if number < 6 else number + 1), label=f"{op}, {impl}")
                even = crossing(sorted((row["shape"]["n"], row["ratio_sdpa"]) for row in own))
                if op == _WHOLE and even is not None:
                    axes.axvline(even, color="gray", linestyle=":", label="_")
                    label = f"break-even, {impl}: {count(even)}"
                    axes.annotate(label, (even, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7)
            _log_log(axes, "tokens", "ms", dense)
        made.append(save(panels[0][0].figure, directory / "time_by_length.png"))
    if steps:
        panels = _panels(steps, lambda row: f"{row['shape']['kv_heads']} KV heads, {row['dtype']}")
        for axes, group in panels:
            for number, stack in enumerate(dict.fromkeys(row["stack"] for row in steps)):
                times = {row["shape"]["n"]: row["median_ms"] for row in group if row["stack"] == stack}
                axes.plot(*_line(times), **series_style(number), label=stack)
            _log_log(axes, "tokens of history", "ms per output token", [row["shape"]["n"] for row in group])
        made.append(save(panels[0][0].figure, directory / "tpot_by_history.png"))
    return made


def _panels(rows: Sequence[Row], title: Callable[[Row], str]) -> list[tuple[Any, list[Row]]]:
    """Return a pair of axes per kind of row, side by side, with the rows of that kind."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(title(row), []).append(row)
    across = min(len(kinds), 2)  # at most 1,280 pixels
    down = -(-len(kinds) // across)
    panels = figure(5.3 * across, 4.5 * down).subplots(down, across, squeeze=False).flatten()
    for axes, name in zip(panels, kinds, strict=False):
        axes.set_title(name, fontsize=10)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    return list(zip(panels, kinds.values(), strict=False))


def _line(times: dict[int, float]) -> tuple[list[int], list[float]]:
    lengths = sorted(times)
    return lengths, [times[length] for length in lengths]


def _log_log(axes: Any, across: str, up: str, lengths: Iterable[int]) -> None:
    axes.set(xlabel=across, ylabel=up, xscale="log", yscale="log")
    ticks = sorted(set(lengths))
    axes.set_xticks(ticks, [count(each) for each in ticks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)
    label_ends(axes)
