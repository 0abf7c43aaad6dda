"""Drawing for the page: SVG files that come out the same from the same rows. matplotlib is the extra ``plot``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopserve.bench.figures import label_ends, per_cent, series_style
from loopserve.core.errors import ConfigError

Points = Sequence[tuple[float, float]]

_PALE = "#cfd4d8"


class Pictures:
    """A folder of pictures, and how the page refers to them."""

    def __init__(self, directory: Path, page: Path) -> None:
        self._directory = directory
        self._link = Path(os.path.relpath(directory, page.parent))

    def figure(self, width: float, height: float) -> Any:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("the page's pictures need matplotlib: pip install 'loopserve[plot]'") from error
        return Figure(figsize=(width, height), layout="constrained")

    def save(self, figure: Any, name: str, says: str) -> str:
        """Name the lines of a figure and write it; the line of markdown that shows it. says: for those who cannot see it."""
        from matplotlib import rc_context

        for axes in figure.axes:  # now, as panels that share an axis are bound by the limits of the last one drawn
            label_ends(axes)
        path = self._directory / f"{name}.svg"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(path, metadata={"Date": None, "Creator": None})
        except OSError as error:
            raise ConfigError(f"{path}: cannot write the picture ({error.strerror})") from error
        # Lines that end in a blank would be changed by editors and checks.
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
        return f"![{says}]({(self._link / path.name).as_posix()})"


def lines(
    axes: Any,
    series: Mapping[str, Points],
    *,
    faint: Mapping[str, Points] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """One line per name; faint ones behind them in grey, without a name.

    names: all names in the order of the styles, where several panels must agree on them.
    """
    order = list(names or series)
    for points in (faint or {}).values():
        axes.plot(*_columns(points), color=_PALE, linewidth=1, marker=".", zorder=1)
    for name, points in series.items():
        axes.plot(*_columns(points), **series_style(order.index(name)), label=name, zorder=2)


def _columns(points: Points) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return [x for x, _ in ordered], [y for _, y in ordered]


def scatter(axes: Any, series: Mapping[str, tuple[float, float]]) -> None:
    """One point per name."""
    for number, (name, (x, y)) in enumerate(series.items()):
        axes.plot([x], [y], **series_style(number) | {"linestyle": "none", "markersize": 7.0}, label=name)


def dressed(axes: Any, title: str, across: str, up: str, *, shares: str = "", **limits: Any) -> None:
    """Titles and grid.

    shares: which of ``x`` and ``y`` are shares, which are written as per cent.
    """
    axes.set_title(title, fontsize=10)
    axes.set(xlabel=across, ylabel=up, **limits)
    axes.grid(alpha=0.25)
    per_cent(*(getattr(axes, f"{side}axis") for side in shares))


def heat(axes: Any, values: Sequence[Sequence[float]], across: str, up: str, written: str = "{:.0f}") -> Any:
    """A map of a few numbers, each written in its place."""
    shown = axes.imshow(values, cmap="YlGnBu", aspect="auto")
    top = max(max(row) for row in values)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if value > 0.6 * top else "black"
            axes.text(x, y, written.format(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(values[0])))
    axes.set_yticks(range(len(values)))
    axes.set(xlabel=across, ylabel=up)
    return shown
