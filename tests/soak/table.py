"""Write the table of docs/reliability.md from the rows of the full runs: ``python -m tests.soak.table``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loopserve.bench.rows import read_rows

DOCUMENT, ROWS = Path("docs/reliability.md"), Path("benchmarks/results/soak.jsonl")
MARKS = "<!-- rows: python -m tests.soak.table -->", "<!-- end of rows -->"
# What of a row is a figure of its promise; the rest says how it was measured.
_NOT_SHOWN = {
    "op",
    "promise",
    "cases",
    "failed",
    "seconds",
    "seed",
    "threads",
    "device",
    "versions",
    "commit",
    "date",
    "statuses",
}


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Return the table: a line for each promise with its newest row."""
    newest = {row["promise"]: row for row in rows}
    lines = ["| promise | cases | failed | measured | seconds | commit |", "|---|---|---|---|---|---|"]
    for name in names:
        row = newest.get(name)
        if row is None:
            lines.append(f"| {name} | not yet run | | | | |")
            continue
        figures = ", ".join(f"{key} {_shown(value)}" for key, value in row.items() if key not in _NOT_SHOWN)
        lines.append(
            f"| {name} | {row['cases']:,} | {row['failed']} | {figures or '-'} | {row['seconds']:.0f} | {row['commit']} |"
        )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    from tests.soak.__main__ import FULL

    text = DOCUMENT.read_text(encoding="utf-8")
    found = table(read_rows(ROWS) if ROWS.exists() else [], list(FULL))
    begin, end = map(re.escape, MARKS)
    made = f"{MARKS[0]}\n{found}\n{MARKS[1]}"
    DOCUMENT.write_text(re.sub(f"{begin}.*{end}", lambda _: made, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
