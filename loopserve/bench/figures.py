"""Draw figures of the demonstration and of speed benchmarks without a display, and save them as images or SVG.

matplotlib is an extra: ``pip install loopserve[plot]``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from loopserve.bench.report import count, crossing
from loopserve.bench.rows import Row
from loopserve.core.errors import ConfigError

# Okabe and Ito's palette for colour vision deficiencies, without its yellow, which has too little contrast on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP*X<>dph"  # 13 distinguishable markers; 13 and 7 share no factor, so a pair repeats after 91 series
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_LABEL_PT = 7.0
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata keys that contain web addresses
_WHOLE = "sparse_prefill"  # scoring, selection and attention
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
_FIRST_TURN = ("dense_attention", "vertical_slash", _WHOLE)


def figure(width: float, height: float) -> Any:
    """Return an empty figure of the given size in inches. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'loopserve[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: str | Path) -> Path:
    """Write a figure in the image format that the file suffix names. Raises ConfigError for an unsupported format."""
    try:
        drawn.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot write the plot ({error})") from error
    return Path(path)


def svg(drawn: Any, name: str) -> str:
    """Return a figure as an ``<svg>`` element; the same figure gives the same text.

    name: prefix that keeps its ids unique on a page.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        drawn.savefig(text, format="svg", metadata=_NO_METADATA)
    found = text.getvalue()
    element = found[found.index("<svg") :]
    # Ids restart in every figure, and two figures on one page must not refer to each other's ids.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{re.escape(name)}-", element)


def series_style(number: int) -> dict[str, Any]:
    """Return the line style of a series. Colour, marker and dashes each distinguish it from the others.

    Markers are hollow, so that a covered point stays visible.
    """
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "markerfacecolor": "none",
        "markersize": 5.0,
        "linewidth": 1.3,
    }


def per_cent(*sides: Any) -> None:
    """Format the ticks of these axes (``axes.xaxis``, ``axes.yaxis``) as per cent."""
    from matplotlib.ticker import PercentFormatter

    for side in sides:
        side.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def label_ends(axes: Any) -> None:
    """Write the name of each labelled line beside its last point, right of the axes, in its colour, without overlaps.

    Call it last: the positions depend on the limits of the axes.
    """
    named = list(_labelled(axes))
    if not named:
        return
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    rows = axes.get_subplotspec().get_gridspec().nrows
    height = axes.figure.get_size_inches()[1] * 72.0 * 0.8 / rows
    ends = []
    for label, line in named:
        xs, ys = line.get_xdata(), line.get_ydata()
        if len(xs) == 0:
            continue
        across = line.get_transform() == axes.get_yaxis_transform(
            which="grid"
        )  # for axhline, x is a fraction of the axes
        x = axes.get_xlim()[1] if across else float(xs[-1])
        ends.append((float(to_axes.transform((x, float(ys[-1])))[1]), label, (x, float(ys[-1])), line.get_color()))
    ends.sort(key=lambda each: (round(each[0], 3), each[2][0], each[1]))
    places = _spread([each[0] for each in ends], 1.25 * _LABEL_PT / height)
    for place, (_, label, end, colour) in zip(places, ends, strict=True):
        axes.annotate(
            label,
            xy=end,
            xytext=(1.05, place),
            textcoords="axes fraction",
            va="center",
            fontsize=_LABEL_PT,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def _labelled(axes: Any) -> Iterable[tuple[str, Any]]:
    """Return the lines with a label. Error bars carry the label on their container."""
    for line in axes.get_lines():
        if not str(line.get_label()).startswith("_"):
            yield line.get_label(), line
    for container in axes.containers:
        if not str(container.get_label()).startswith("_") and hasattr(container, "has_yerr"):
            yield container.get_label(), container[0]


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Return positions in the order of those wanted, at least ``gap`` apart, and moved down where they would exceed the axes."""
    places: list[float] = []
    for each in wanted:
        places.append(max(each, places[-1] + gap) if places else each)
    limit = max(1.0, gap * (len(places) - 1))
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


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
