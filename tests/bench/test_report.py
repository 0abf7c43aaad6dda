"""The tables in the documents are those of the committed result files."""

from __future__ import annotations

from pathlib import Path

from loopserve.bench.report import renew

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_committed_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert renew(text, ROOT) == text, "run: python -m loopserve.bench.report README.md"
    assert "| `loopserve` |" in text
