"""Jumps that no past row foresaw: answered within the step by pages, or noticed as drift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopserve.core.kv.key_summaries import best_pages
from loopserve.policies.decode.loopserve.probe import best_columns
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.planted import LAYERS, Script, kept, lost
from tests.policies.test_loopserve_decode import ANSWER, FACT, OTHER, converse, indices, loopserve

JUMP = 6  # outputs before the answer turns to a place that nothing has looked at yet
NEVER = 1000


def jumping() -> Script:
    script = Script()
    script.tell(0, FACT)
    script.tell(1, OTHER)
    script.look(0, range(ANSWER - 8, ANSWER + JUMP))
    script.queries[:, :, : ANSWER + JUMP, 1] = -1.0  # looks away, so that chance brings no part of it in
    script.look(1, range(ANSWER + JUMP, ANSWER + 20))
    return script


def talk_until_the_jump(**fields: Any) -> ScriptedConversation:
    talk = converse(loopserve(interval=NEVER, window=4, **fields), jumping(), steps=JUMP)
    assert kept(indices(talk), FACT) and lost(base(talk), OTHER)
    return talk


def base(talk: ScriptedConversation, layer: int = 0) -> torch.Tensor:
    found: torch.Tensor = talk.state.selections[layer].indices
    return found


def test_without_either_the_jump_is_missed() -> None:
    talk = talk_until_the_jump()
    talk.decode()
    assert lost(indices(talk), OTHER)


@pytest.mark.parametrize("page", [4, 16])
def test_page_budget_brings_the_page_in_within_the_step(page: int) -> None:
    talk = talk_until_the_jump(page_budget=16, page=page)
    talk.decode()
    for layer in range(LAYERS):
        assert kept(indices(talk, layer), OTHER) and lost(base(talk, layer), OTHER)
        assert indices(talk, layer).shape[1] == 40 and base(talk, layer).shape[1] == 24


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_keys_bring_in_single_tokens(bits: int) -> None:
    """Six tokens of a place are found with a budget of six; by whole pages they are not."""
    for key_bits, found in ((0, False), (bits, True)):
        talk = talk_until_the_jump(page_budget=6, page=16, key_bits=key_bits)
        talk.decode()
        assert kept(indices(talk), OTHER) is found and indices(talk).shape[1] == 40


@given(heads=st.integers(1, 3), total=st.integers(1, 60), budget=st.integers(1, 70), seed=st.integers(0, 1000))
def test_best_columns_are_exact(heads: int, total: int, budget: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    free = torch.rand(heads, total, generator=source) < 0.7
    scores = torch.randint(0, 4, (heads, total), generator=source).float()
    taken = best_columns(scores, free, budget)
    for head in range(heads):
        order = sorted(
            free[head].nonzero().flatten().tolist(), key=lambda column: (-float(scores[head, column]), column)
        )
        assert taken[head].nonzero().flatten().tolist() == sorted(order[:budget])


def test_page_summaries_are_charged() -> None:
    talk = talk_until_the_jump(page_budget=16, page=16)
    keys = talk.cache.layers[0].store
    assert keys is not None
    pages = -(-keys.length // 16)
    per_step = 2 * pages * keys.keys[:, 0].numel() * 4 * LAYERS
    before = talk.record.bytes["summaries"]
    talk.decode()
    assert talk.record.bytes["summaries"] - before == per_step


@pytest.mark.parametrize("key_bits", [0, 2, 4, 8])
def test_drift_reselects_within_the_step_and_only_at_the_jump(key_bits: int) -> None:
    talk = talk_until_the_jump(trigger="drift", key_bits=key_bits)
    assert talk.record.counters["drift"] == 0 and talk.record.counters["reselections"] == 0
    talk.decode()
    assert talk.record.counters["drift"] == LAYERS and talk.record.counters["reselections"] == 1
    assert all(kept(indices(talk, layer), OTHER) for layer in range(LAYERS))
    talk.decode(4)
    assert talk.record.counters["reselections"] <= 2


def test_drift_in_one_layer_reaches_all_layers_after_the_step() -> None:
    script = jumping()
    script.queries[0, :, ANSWER + JUMP :, 1] = 0.0
    script.queries[0, :, ANSWER + JUMP :, 0] += 3.0  # the first layer goes on looking at the old fact
    talk = converse(loopserve(interval=NEVER, window=4, trigger="drift"), script, steps=JUMP + 1)
    assert talk.record.counters["drift"] == 1
    assert kept(indices(talk, 0), OTHER) and kept(indices(talk, 1), OTHER)


def test_drift_waits_for_its_minimum_interval() -> None:
    talk = talk_until_the_jump(trigger="drift", drift_min_interval=JUMP + 3)
    talk.decode(2)
    assert talk.record.counters["drift"] == 0
    talk.decode()
    assert talk.record.counters["drift"] == LAYERS


def test_drift_has_a_longest_interval_if_asked() -> None:
    talk = talk_until_the_jump(trigger="drift", drift_max_interval=3, drift_threshold=1e-6)
    assert talk.record.counters["reselections"] == JUMP // 3


def test_pages_and_drift_work_together() -> None:
    talk = talk_until_the_jump(trigger="drift", page_budget=16, page=4)
    talk.decode(3)
    assert kept(indices(talk), OTHER) and indices(talk).shape[1] == 40


@given(
    heads=st.integers(1, 3),
    total=st.integers(1, 60),
    page=st.integers(1, 9),
    budget=st.integers(0, 70),
    seed=st.integers(0, 1000),
)
def test_best_pages_are_exact(heads: int, total: int, page: int, budget: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    free = torch.rand(heads, total, generator=source) < 0.7
    bounds = torch.randint(0, 4, (heads, -(-total // page)), generator=source).float()
    taken = best_pages(bounds, free, page, budget)
    for head in range(heads):
        order = sorted(range(bounds.shape[1]), key=lambda number: (-float(bounds[head, number]), number))
        columns = [
            c for number in order for c in range(number * page, min(total, (number + 1) * page)) if free[head, c]
        ]
        assert taken[head].nonzero().flatten().tolist() == sorted(columns[:budget])


def test_rescoring_by_codes_follows_the_answer_and_reads_no_keys() -> None:
    """What each output looked at, the codes seen as it came: the next selection needs no other reading."""
    by = {}
    for rescore in ("keys", "codes"):
        talk = converse(
            loopserve(interval=8, page_budget=6, page=16, key_bits=8, rescore=rescore, memory=0.0),
            jumping(),
            steps=JUMP,
        )
        read_before = talk.record.bytes["scoring"]
        talk.decode(12)  # past the jump, and past a selection after it
        assert talk.record.counters["reselections"] == 2
        by[rescore] = base(talk), talk.record.bytes["scoring"] - read_before
    assert by["codes"][1] == 0 < by["keys"][1]
    for chosen, _ in by.values():
        assert kept(chosen, OTHER)


def test_a_selection_that_changes_each_step_is_attended_in_place() -> None:
    talk = talk_until_the_jump(page_budget=6, page=16, key_bits=2)
    assert all(layer.active is not None and layer.active.pairs is None for layer in talk.cache.layers)
    assert talk.cache.active_bytes == 0


def test_codes_need_the_reading_that_they_are_seen_by() -> None:
    for fields in ({"rescore": "codes"}, {"rescore": "codes", "key_bits": 2, "page_budget": 6, "trigger": "drift"}):
        with pytest.raises(ValueError, match="rescore: codes needs"):
            loopserve(**fields)


def test_short_conversations_are_decoded_dense() -> None:
    talk = converse(loopserve(interval=4, dense_below=1000.0), jumping(), steps=9)
    assert not talk.state.selections and talk.record.counters["reselections"] == 0
    assert all(layer.active is None for layer in talk.cache.layers)
