"""Recordings stand where the dialogue's parts stand, and what is measured on them hangs together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopserve.bench.recall import HELD_OUT_SEED, RecallTask
from research.evidence import attention_map, concentration, coverage, overlap
from research.evidence.coverage import call_of
from research.evidence.recipes import DENSE
from research.evidence.recording import Recording, loaded, record

TASK: dict[str, Any] = {"tokens": 400, "turns": 3, "keys": 2, "position": "begin"}


@pytest.fixture(scope="module")
def recording() -> Recording:
    return record("demo", RecallTask(**TASK), HELD_OUT_SEED + 5)


def test_the_parts_of_a_turn_are_where_the_layout_says(recording: Recording) -> None:
    words = recording.layout.words
    assert recording.turns == 3
    for turn in range(3):
        start, stop = recording.rows_of(turn)
        assert words[start] == ("<user>" if turn else "<bos>")
        assert words[stop - 1] == "<assistant>"
        first, last = recording.question_rows(turn)
        assert " ".join(words[first:last]) == recording.layout.turns[turn].turn.question
        assert start <= first < last <= stop


def test_a_recorded_head_looks_where_it_was_trained_to_look(recording: Recording) -> None:
    """Some head of the first layers looks at the word before: only so if rows, columns and words are aligned."""
    heads = recording.block(0, 0, recording.length)
    best = 0.0
    for head in range(heads.queries.shape[0]):
        group = heads.queries.shape[0] // heads.keys.shape[0]
        scores = heads.queries[head] @ heads.keys[head // group].T * heads.scaling
        weights = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf")).softmax(1)
        best = max(best, float(weights.diagonal(-1).mean()))
    assert best > 0.5


def test_coverage_of_dense_is_one_and_of_a_window_less(recording: Recording) -> None:
    policies = {
        "dense": DENSE,
        "window": {"policy": "a_shape", "sink_tokens": 4, "local_window": 16},
        "lines": {"policy": "loopserve", "alpha": 0.9, "sample_rows": 32, "min_new_tokens": 0, "min_total_tokens": 0},
        "static": {"policy": "static_lines", "alpha": 0.9, "sample_rows": 32},
    }
    found = coverage.measure({"model": "demo", "task": TASK, "seed": 5, "policies": policies})
    dense, window, lines, static = (found[name] for name in policies)
    assert dense["mean"] == dense["worst"] == dense["cells"] == 1.0
    assert window["worst"] < window["mean"] < 0.999
    assert window["cells"] < 0.5
    assert lines["held_out"] > window["held_out"]
    assert lines["mean"] > static["mean"]  # chosen for these turns, not for the first
    assert len(lines["lines"]) == len(recording.layers)


def test_a_call_says_where_its_turn_stands(recording: Recording) -> None:
    state: dict[Any, Any] = {}
    call = call_of(recording, 1, 2, state)
    start, stop = recording.rows_of(2)
    assert (call.turn, call.turn_start, call.total_tokens, call.layer.index) == (2, start, stop, 1)
    assert call.state is state


def test_fewer_lines_suffice_for_less_mass_and_when_they_may_be_any() -> None:
    found = concentration.measure({"model": "demo", "task": TASK, "seed": 5})
    for block in ("whole", "turn"):
        nine, more = (found[block][str(alpha)] for alpha in concentration.ALPHAS)
        for name in ("fewest", "by_length", "cells"):
            low, high = torch.tensor(nine[name]), torch.tensor(more[name])
            assert low.shape == (4, 4)
            assert bool((low <= high).all())
            assert bool(((low > 0) & (high < 1)).all())
        assert torch.tensor(nine["fewest"]).mean() <= torch.tensor(nine["by_length"]).mean()


def test_own_lines_hold_what_was_asked_and_others_less() -> None:
    found = overlap.measure({"model": "demo", "task": TASK, "seed": 5})
    for pair in overlap.PAIRS:
        figures = found[pair]
        assert all(own >= overlap.ALPHA - 1e-3 for own in figures["own"])
        assert sum(figures["held"]) < sum(figures["own"])
        assert all(0 <= value <= 1 for name in ("verticals", "slashes", "both") for value in figures[name])
        assert sum(figures["both"]) > sum(figures["chance"])


def test_the_same_block_overlaps_itself_wholly(recording: Recording) -> None:
    side = overlap._turn(recording, 2, 2)
    same = overlap._compared(side, side)
    assert same["verticals"] == same["slashes"] == same["both"] == 1.0
    assert same["held"] == pytest.approx(side.own, abs=1e-3)


def test_the_map_of_a_head_shows_its_weights() -> None:
    weights = torch.zeros(16, 24)
    weights[3, 10] = 1.0
    weights[12, 20] = 0.1
    assert attention_map.digits(weights) == ["090", "007"]


def test_the_model_is_loaded_once() -> None:
    assert loaded("demo") is loaded("demo")
