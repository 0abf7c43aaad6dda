"""Write the three figures of the demonstration on a pretrained model, for the terminal and for the documents. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BOOK_COLUMNS = ("same answer as dense", "KV pairs read", "time")


def book_cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the cells of a stack under ``BOOK_COLUMNS``. Time is of all turns, prefill and decoding."""
    return f"{row['same']} of {row['asked']}", f"{row['attended_fraction']:.1%}", f"{row['seconds']:.0f} s"
