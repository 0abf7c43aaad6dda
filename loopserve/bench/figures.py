"""Draw matplotlib figures without a display, and save them as images or SVG.

matplotlib is an extra: ``pip install loopserve[plot]``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loopserve.core.errors import ConfigError

# Okabe and Ito's palette for colour vision deficiencies, without its yellow, which has too little contrast on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP*X<>dph"  # 13 distinguishable markers; 13 and 7 share no factor, so a pair repeats after 91 series
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_LABEL_PT = 7.0
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # metadata keys that contain web addresses


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
