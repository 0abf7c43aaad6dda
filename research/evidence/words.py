"""Markdown of figures: tables, percentages, lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every row as long as the header."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(share: float | None, digits: int = 1) -> str:
    """``12.3 %``; ``-`` where there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def points(share: float) -> str:
    """A difference of shares in points, signed."""
    return f"{100 * share:+.0f} points" if abs(share) >= 0.005 else "0 points"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else list(names))


def verdict(holds: bool | None, text: str) -> str:
    """One bold line: whether a claim holds, here; None where these runs cannot tell."""
    said = "Cannot be decided, here" if holds is None else "Holds, here" if holds else "Does not hold, here"
    return f"**{said}:** {text}"
