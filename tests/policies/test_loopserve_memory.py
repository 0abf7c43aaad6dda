"""Joining and choosing by position, over stores whose heads hold different pairs."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.policies.decode.loopserve.memory import (
    ScoreAccumulator,
    by_position,
    captured_share,
    choose,
    overlap,
)
from loopserve.policies.decode.loopserve.policy import LoopServeDecode
from loopserve.policies.decode.loopserve.probe import selection_of
from loopserve.testing.assertions import assert_selection, unchanged
from loopserve.testing.inputs import make_inputs
from loopserve.testing.strategies import attention_inputs


def config(**fields: Any) -> LoopServeDecode.Config:
    return LoopServeDecode.Config(**({"sink_tokens": 0, "recent_window": 0, "pooling": 1} | fields))


@settings(max_examples=60)
@given(
    inputs=attention_inputs(max_tokens=60),
    budget=st.integers(1, 70),
    share=st.sampled_from(["none", "heads", "all"]),
    pooling=st.sampled_from([1, 3, 7]),
    outputs=st.integers(0, 5),
)
def test_choices_are_exact_over_any_store(
    inputs: AttentionInputs, budget: int, share: str, pooling: int, outputs: int
) -> None:
    options = config(budget=budget, share=share, pooling=pooling)
    boundary = max(0, inputs.length - outputs)
    memory = ScoreAccumulator()
    with unchanged(inputs):
        memory.add(options, 0, by_position(inputs.token_scores(inputs.queries, inputs.columns), inputs))
        memory.commit(0.0)
        selection = choose(options, memory.accumulated[0], inputs, boundary)
    held = [inputs.head_positions(head) for head in range(inputs.keys.shape[0])]
    counts = [int(((row >= 0) & (row < boundary)).sum()) for row in held]
    if selection is None:
        assert max(counts) <= budget
        return
    assert max(counts) > budget
    assert_selection(selection, inputs, budget)
    assert torch.allclose(overlap(selection, selection), torch.ones(len(held)))


@settings(max_examples=60)
@given(inputs=attention_inputs(max_tokens=50), seed=st.integers(0, 99), tail=st.integers(0, 8))
def test_a_selection_made_of_columns_attends_to_these_columns(inputs: AttentionInputs, seed: int, tail: int) -> None:
    heads, total = inputs.keys.shape[:2]
    boundary = max(0, inputs.length - min(tail, inputs.new_tokens))
    positions = inputs.positions.expand(heads, -1)
    mask = torch.rand(heads, total, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask = (mask & (positions >= 0)) | (positions >= boundary)
    like = choose(config(budget=1), torch.ones(1, inputs.length), inputs, boundary)
    if like is None:
        return
    selection = selection_of(mask, inputs, like)
    selection.check(heads, inputs.length)
    assert torch.equal(inputs.attended(selection), mask)


def test_scores_land_on_their_positions_and_fillers_nowhere() -> None:
    inputs = make_inputs(new_tokens=4, total_tokens=20, evicted=9, ragged=3)
    scores = torch.rand(2, 20) + 0.5
    laid = by_position(scores, inputs)
    for head in range(2):
        row = inputs.positions[head]
        assert torch.equal(laid[head, row[row >= 0]], scores[head, row >= 0])
        assert torch.allclose(laid[head].sum(), scores[head, row >= 0].sum())


def test_memory_is_a_decaying_maximum_that_grows_with_the_conversation() -> None:
    options = config(budget=2, share="all", memory=0.5)
    memory = ScoreAccumulator()
    memory.add(options, 0, torch.tensor([[3.0, 1.0]]))
    memory.add(options, 5, torch.tensor([[3.0, 1.0]]))
    memory.commit(1.0)
    assert torch.allclose(memory.accumulated[0], torch.tensor([[0.75, 0.25]]))
    memory.add(options, 0, torch.tensor([[0.0, 1.0, 1.0]]))
    memory.commit(0.5)
    assert torch.allclose(memory.accumulated[0], torch.tensor([[0.375, 0.5, 0.5]]))
    memory.add(options, 0, torch.tensor([[1.0, 0.0, 0.0]]))
    memory.commit(0.0)
    assert torch.allclose(memory.accumulated[0], torch.tensor([[1.0, 0.0, 0.0]]))


def test_captured_share_counts_selection_and_tail() -> None:
    inputs = make_inputs(new_tokens=2, total_tokens=6, kv_heads=1, group=1)
    selection = choose(config(budget=1), torch.tensor([[0.1, 0.4, 0.1, 0.1, 0.2, 0.1]]), inputs, 5)
    assert selection is not None
    assert selection.attended_positions(6).tolist() == [[False, True, False, False, False, True]]
    assert torch.allclose(
        captured_share(torch.tensor([[0.1, 0.4, 0.1, 0.1, 0.2, 0.1]]), selection), torch.tensor([0.5])
    )
