"""The page, from rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from research.evidence.units import Unit
from research.evidence_real.ledger import Ledger


def write(ledger: Ledger, plan: Sequence[Unit], text: Path, pictures: Path) -> None:
    """Write the page."""
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("", encoding="utf-8")
