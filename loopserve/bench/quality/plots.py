"""Plot scores against attended share, by turn, over a setting, and per layer and head.

Line plots take rows of ``summary.summarise``. Heat maps take values by layer and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from loopserve.bench.figures import figure, label_ends, per_cent, series_style
from loopserve.bench.quality.records import Record

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
