"""The tables in the documents are those of the committed result files."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopserve.bench.report import renew

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmark.md"])
def test_the_pages_show_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert renew(text, ROOT) == text, "run: python -m loopserve.bench.report README.md docs/benchmark.md"
    assert "| `loopserve` |" in text


def test_a_speed_table_leaves_out_what_its_marker_says() -> None:
    every = "<!-- speed: benchmarks/results/cpu.jsonl decode_step --> <!-- end of speed -->"
    some = every.replace(" -->", ' not "64K" "12/4 heads" -->', 1)
    assert "64K" in renew(every, ROOT) and "12/4 heads" in renew(every, ROOT)
    body = renew(some, ROOT).split("-->", 1)[1]
    assert "64K" not in body and "12/4 heads" not in body and "32K" in body
