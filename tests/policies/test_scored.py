"""SnapKV against its formula, and what every scored compressor owes: exact budgets, forced pairs, both retentions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import AttentionInputs, Phase, Step
from loopserve.core.policy.scoring import ScoredCompressor
from loopserve.policies.decode.random import RandomDecode
from loopserve.policies.decode.snapkv import SnapKVDecode
from loopserve.testing.assertions import assert_selection, unchanged
from loopserve.testing.inputs import FakeRecord, make_inputs
from loopserve.testing.scripted import ScriptedConversation
from loopserve.testing.strategies import attention_inputs


def naive_snapkv(inputs: AttentionInputs, window: int, kernel: int) -> torch.Tensor:
    """The formula of kvpress in plain loops, double precision: scores of the keys before the window ``[Hkv, Tk - window]``."""
    total, group = inputs.total_tokens, inputs.group
    scores = torch.zeros(inputs.keys.shape[0], total - window, dtype=torch.float64)
    for head in range(inputs.queries.shape[0]):
        votes = [0.0] * (total - window)
        for row in range(window):
            query = inputs.queries[head, inputs.new_tokens - window + row].double()
            seen = total - window + row + 1
            weights = [
                math.exp(float(query @ key) * inputs.scaling) for key in inputs.keys[head // group, :seen].double()
            ]
            for column in range(total - window):
                votes[column] += weights[column] / sum(weights) / window
        for column in range(total - window):
            near = [votes[c] for c in range(column - kernel // 2, column + kernel // 2 + 1) if 0 <= c < len(votes)]
            scores[head // group, column] += sum(near) / kernel / group
    return scores


@pytest.mark.parametrize(
    ("window", "kernel", "group", "seed"), [(8, 5, 2, 0), (4, 3, 1, 1), (6, 7, 4, 2), (1, 1, 2, 3)]
)
def test_snapkv_equals_its_formula(window: int, kernel: int, group: int, seed: int) -> None:
    inputs = make_inputs(new_tokens=20, total_tokens=44, group=group, seed=seed, structured=True)
    policy = SnapKVDecode(SnapKVDecode.Config(budget=window + 6, window=window, kernel=kernel))
    wanted = naive_snapkv(inputs, window, kernel)
    found = policy.score(inputs)
    assert torch.allclose(found[:, :-window].double(), wanted, atol=1e-6) and found[:, -window:].isposinf().all()
    selection = select(policy, inputs)
    for head in range(inputs.keys.shape[0]):
        best = wanted[head].topk(6).indices.tolist()
        assert selection[head].tolist() == sorted([*best, *range(44 - window, 44)])


def select(policy: ScoredCompressor, inputs: AttentionInputs) -> torch.Tensor:
    state = policy.init_state()
    policy.after_attention(inputs, state)
    answer = policy.after_forward(step_of(inputs), state)
    assert answer is not None
    return answer[inputs.layer.index].indices


def step_of(inputs: AttentionInputs) -> Step:
    return Step(
        phase=inputs.phase,
        turn=inputs.turn,
        turn_start=inputs.turn_start,
        length=int(inputs.head_positions(0)[-1]) + 1,
        output_index=inputs.output_index,
        final=inputs.final,
        layers=(inputs.layer,),
        record=inputs.record,
    )


@settings(max_examples=50)
@given(
    inputs=attention_inputs(max_tokens=60),
    budget=st.integers(1, 80),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 5),
    name=st.sampled_from(["snapkv", "random"]),
    retention=st.sampled_from(list(Retention)),
)
def test_scored_selections_are_exact_and_forced_pairs_are_kept(
    inputs: AttentionInputs, budget: int, sinks: int, recent: int, name: str, retention: Retention
) -> None:
    fewest = inputs.total_tokens - (int(inputs.first_valid.max()) if inputs.first_valid is not None else 0)
    budget = max(min(budget, fewest), sinks + max(recent, 3))
    shared = {"budget": budget, "sink_tokens": sinks, "recent_window": recent, "retention": retention}
    policy: ScoredCompressor = (
        SnapKVDecode(SnapKVDecode.Config(window=3, kernel=3, **shared))
        if name == "snapkv"
        else RandomDecode(RandomDecode.Config(seed=5, **shared))
    )
    state = policy.init_state()
    with unchanged(inputs):
        policy.after_attention(inputs, state)
    answer = policy.after_forward(step_of(inputs), state)
    if answer is None:
        assert inputs.total_tokens <= budget
        return
    selection = answer[inputs.layer.index]
    assert selection.retention is retention
    if budget <= fewest:
        assert_selection(selection, inputs, budget)
        for head in range(inputs.keys.shape[0]):
            held = inputs.head_positions(head)
            held = held[held >= 0]
            forced = set(held[:sinks].tolist()) | set(held[len(held) - recent :].tolist())
            if name == "snapkv":
                forced |= set(held[-min(3, inputs.new_tokens) :].tolist())
            assert forced <= set(selection.head(head).tolist())


def test_snapkv_is_recomputed_every_turn_and_evicts_for_good_only_when_set_to() -> None:
    source = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 200, 16, generator=source)
    keys = torch.randn(2, 2, 200, 16, generator=source)
    for retention in Retention:
        policy = SnapKVDecode(SnapKVDecode.Config(budget=20, window=8, retention=retention))
        talk = ScriptedConversation(policy, queries, keys)
        for turn in range(3):
            talk.prefill(40)
            talk.decode(5)
            assert len(talk.selections) == turn + 1
            assert talk.selections[-1][0].boundary == 40 * (turn + 1) + 5 * turn
        evicts = retention is Retention.EVICT
        assert talk.cache.layers[0].stored == (25 if evicts else 135)


def test_random_is_seeded_and_differs_by_layer_turn_and_length() -> None:
    policy = RandomDecode(RandomDecode.Config(budget=10, sink_tokens=0, recent_window=0))
    one = policy.score(make_inputs())
    assert torch.equal(one, policy.score(make_inputs()))
    for other in (make_inputs(layer=1), make_inputs(turn=1)):
        assert not torch.equal(one, policy.score(other))
    assert not torch.equal(one, RandomDecode(RandomDecode.Config(seed=1)).score(make_inputs()))


def test_nothing_is_selected_while_decoding_or_before_the_last_chunk() -> None:
    policy = SnapKVDecode(SnapKVDecode.Config(budget=10, window=4))
    for inputs in (
        make_inputs(phase=Phase.DECODE, new_tokens=1),
        make_inputs(final=False),
        make_inputs(phase=Phase.OBSERVE),
    ):
        state = policy.init_state()
        policy.after_attention(inputs, state)
        assert policy.after_forward(step_of(inputs), state) is None
    assert isinstance(inputs.record, FakeRecord)
