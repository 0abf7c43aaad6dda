"""Figures of matplotlib, which is an extra: ``pip install loopserve[plot]``. Drawn without a display, saved as images or SVG."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from loopserve.core.errors import ConfigError

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # they hold addresses of the web


def figure(width: float, height: float) -> Any:
    """An empty figure of that many inches. ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'loopserve[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Any, path: str | Path) -> Path:
    """Write a figure as the kind of image that the file's name says. ConfigError if that cannot be."""
    try:
        drawn.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot write the plot ({error})") from error
    return Path(path)


def svg(drawn: Any, name: str) -> str:
    """A figure as an ``<svg>`` element for a page, the same text for the same figure. name: keeps its ids apart from others'."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        drawn.savefig(text, format="svg", metadata=_NO_METADATA)
    found = text.getvalue()
    element = found[found.index("<svg") :]
    # Ids are counted anew in every figure; two figures on one page must not refer to each other's.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{re.escape(name)}-", element)
