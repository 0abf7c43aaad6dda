"""The engine's benchmark compares like with like."""

from __future__ import annotations

from loopserve.bench.speed.engine import run_engine_bench


def test_both_sides_say_the_same_and_the_row_can_be_repeated() -> None:
    result = run_engine_bench(history=96, new_tokens=16, output_tokens=8, runs=2)
    (row,) = result["rows"]
    assert row["same_tokens"] is True
    assert row["ratio"] == row["engine_ms"] / row["transformers_ms"] > 0
    assert row["ratio_q20"] <= row["ratio_q80"]
    assert {"history", "new_tokens", "output_tokens", "runs", "model", "stack"} <= row.keys()
    assert {"torch", "transformers", "threads", "processor"} <= result["machine"].keys()
