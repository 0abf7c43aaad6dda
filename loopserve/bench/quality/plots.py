"""Lines of a run: scores against what an answer costs, by turn, and over a setting. They take rows of ``summary.summarise``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from loopserve.bench.figures import figure
from loopserve.bench.quality.records import Record

Cost = Literal["attended_fraction", "kv_share", "kv_share_with_observation"]
_COSTS: Mapping[Cost, str] = {
    "attended_fraction": "KV pairs attended, share of dense's",
    "kv_share": "KV bytes read per output token, share of dense's",
    "kv_share_with_observation": "KV bytes read per output token, observation included, share of dense's",
}
_MARKERS = "osD^vP*X<>dphH"
_SWEPT: Mapping[str, str] = {
    "coverage_realised": "realised coverage",
    "prefill_tile_density": "tiles computed",
    "score": "score",
    "ttft_ms": "TTFT, ms",
}


def score_by_cost(rows: Sequence[Record], cost: Cost) -> Any:
    """A panel per question position, a line per policy through its budgets; dense is the dashed line.

    rows: of ``summarise(records, "family", "stack", "position")``; those without position make a panel of their own.
    """
    positions = list(dict.fromkeys(row["position"] for row in rows))
    families = list(dict.fromkeys(row["family"] for row in rows))
    drawn = figure(4.6 * len(positions), 4.4)
    for axes, position in zip(drawn.subplots(1, len(positions), squeeze=False, sharey=True)[0], positions, strict=True):
        for number, family in enumerate(families):
            own = [
                row for row in rows if (row["family"], row["position"]) == (family, position) and row[cost] is not None
            ]
            if own and all(row[cost] >= 0.9995 for row in own):  # it attends to everything: a level, not a point
                axes.axhline(own[0]["score"], color="black", linestyle="--", linewidth=1, label=family)
            elif own:
                _errors(axes, sorted(own, key=lambda row: row[cost]), lambda row: row[cost], family, number)
        axes.set(xlabel=_COSTS[cost], title=f"question at {position}" if position else "all questions")
        axes.set_xlim(left=0)
        axes.xaxis.label.set_fontsize(8)
        _grid(axes)
    first = drawn.axes[0]
    first.set(ylabel="score", ylim=(-0.02, 1.02))
    _legend(drawn)
    return drawn


def score_by_turn(rows: Sequence[Record]) -> Any:
    """A line per stack. rows: of ``summarise(records, "stack", "turn")``."""
    drawn = figure(6.5, 4.4)
    axes = drawn.subplots()
    for number, (stack, own) in enumerate(_by(rows, "stack").items()):
        _errors(axes, own, lambda row: row["turn"] + 1, stack, number)
    axes.set(ylabel="score", ylim=(-0.02, 1.02))
    _turns(axes, rows)
    _legend(drawn)
    return drawn


def ttft_by_turn(rows: Sequence[Record]) -> Any:
    """A line per stack, medians. rows: of ``summarise(records, "stack", "turn")``."""
    drawn = figure(6.5, 4.4)
    axes = drawn.subplots()
    for number, (stack, own) in enumerate(_by(rows, "stack").items()):
        axes.plot([row["turn"] + 1 for row in own], [row["ttft_ms"] for row in own], **_style(number), label=stack)
    axes.set(ylabel="TTFT, ms")
    axes.set_ylim(bottom=0)
    _turns(axes, rows)
    _legend(drawn)
    return drawn


def sweep(rows: Sequence[Record], setting: str, by: str = "family") -> Any:
    """A setting such as alpha against realised coverage, density, score and TTFT: a panel each, a line per ``by``.

    rows: of ``summarise``, each with the setting's value under its name; panels that no row has a figure for are left out.
    """
    shown = [name for name in _SWEPT if any(row.get(name) is not None for row in rows)]
    drawn = figure(3.8 * len(shown), 3.8)
    for axes, name in zip(drawn.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, (label, own) in enumerate(_by(rows, by).items()):
            known = sorted((row for row in own if row.get(name) is not None), key=lambda row: row[setting])
            if name == "score":
                _errors(axes, known, lambda row: row[setting], label, number)
            else:
                axes.plot([row[setting] for row in known], [row[name] for row in known], **_style(number), label=label)
        axes.set(xlabel=setting, title=_SWEPT[name])
        _grid(axes)
    _legend(drawn)
    return drawn


def _errors(axes: Any, rows: Sequence[Record], place: Callable[[Record], float], label: str, number: int) -> None:
    """A line with standard errors where they are known."""
    spread = [row["score_se"] or 0.0 for row in rows]
    axes.errorbar(
        [place(row) for row in rows], [row["score"] for row in rows], spread, **_style(number), capsize=2, label=label
    )


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5, "linewidth": 1.2}


def _turns(axes: Any, rows: Iterable[Record]) -> None:
    axes.set(xlabel="turn", xticks=sorted({row["turn"] + 1 for row in rows}))
    _grid(axes)


def _grid(axes: Any) -> None:
    axes.grid(alpha=0.3)


def _by(rows: Iterable[Record], name: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def _legend(drawn: Any) -> None:
    """One legend below all panels, each name once."""
    handles: dict[str, Any] = {}
    for axes in drawn.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    drawn.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8)
