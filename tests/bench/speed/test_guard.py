"""The guard's benchmark compares like with like."""

from __future__ import annotations

from loopserve.bench.speed.guard import run_guard_bench
from loopserve.core.engine import decode_step
from loopserve.core.guard.guard import check_selection


def test_both_sides_say_the_same_and_nothing_stays_switched_off() -> None:
    result = run_guard_bench(stacks=["snapkv"], history=80, output_tokens=6, runs=1)
    (row,) = result["rows"]
    assert row["same_tokens"] is True and row["steps"] == 5
    assert row["ratio"] == row["guarded_ms"] / row["bare_ms"] > 0
    assert row["ratio_q20"] <= row["ratio_paired_median"] <= row["ratio_q80"]
    assert 0 < row["asking_us"] < row["guarded_ms"] * 1e3
    assert "torch" in result["machine"]
    assert decode_step.check_selection is check_selection
