"""The benchmark of shared passes compares the same answers."""

from __future__ import annotations

import pytest

from loopserve.bench.speed.engine import run_batch_bench, run_wait_bench
from loopserve.models.bridge import TransformersModel


def test_both_sides_give_the_same_tokens() -> None:
    result = run_batch_bench(
        model="demo", stacks=["dense", "snapkv"], sessions=[1, 3], history=64, output_tokens=5, runs=1
    )
    assert [(row["stack"], row["sessions"]) for row in result["rows"]] == [
        ("dense", 1),
        ("dense", 3),
        ("snapkv", 1),
        ("snapkv", 3),
    ]
    for row in result["rows"]:
        assert row["same_tokens"] is True
        assert row["ratio"] == row["one_after_another_ms"] / row["together_ms"] > 0
    assert "torch" in result["machine"]


def test_the_wait_of_a_short_prompt_is_a_ratio_of_paired_runs() -> None:
    (row,) = run_wait_bench(model="demo", prompt=256, short=16, max_num_batched_tokens=32, runs=2)["rows"]
    assert 0 < row["ratio"] <= row["ratio_worst"]


def test_a_prompt_longer_than_the_window_is_cut_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersModel, "max_positions", 200)
    (row,) = run_wait_bench(model="demo", prompt=256, short=16, max_num_batched_tokens=32, runs=1)["rows"]
    assert row["prompt"] == 198
