"""Budgets, exact and for every compressor: whatever the call looks like, over turns, with both retentions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.registry import Kind, Registration
from loopserve.core.policy.scoring import ScoredCompressor
from loopserve.policies.decode.adakv import AdaKVDecode
from loopserve.policies.decode.pyramidkv import PyramidKVDecode, pyramid
from loopserve.testing.assertions import assert_selection, unchanged
from loopserve.testing.inputs import make_inputs
from loopserve.testing.scripted import ScriptedConversation
from loopserve.testing.strategies import attention_inputs
from tests.policies.small import COMPRESSORS, built, default, label, small, spec, wraps

SCORED = [each for each in COMPRESSORS if isinstance(default(each), ScoredCompressor)]
BUDGETED = [
    pytest.param(each, retention, id=f"{each.name}-{retention}")
    for each in COMPRESSORS
    if each.name not in ("full", "recover_alpha", "twilight", "omnikv", "flowkv", "duo")
    for retention in sorted(each.capabilities.retentions)
]


def resized(policy: Registration, budget: int, **more: Any) -> ScoredCompressor:
    """A scored policy, or a wrapper's inner one, with another budget and nothing forced."""
    options = {"budget": budget, **more}
    if wraps(policy):
        inner = {"policy": "snapkv", "window": 1, "kernel": 3, **options}
        wrapped: ScoredCompressor = built(Kind.DECODE, {**spec(policy), "inner": inner})
        return wrapped
    forced = {"sink_tokens": 0, "recent_window": 0}
    if policy.name in ("snapkv", "rkv"):
        forced = {"window": 1}
    plain: ScoredCompressor = built(Kind.DECODE, {**spec(policy), **forced, **options})
    return plain


@pytest.mark.parametrize("policy", [each for each in SCORED if each.name != "kvzip"], ids=label)  # it reads again first
@settings(max_examples=25)
@given(inputs=attention_inputs(max_tokens=60), budget=st.integers(1, 70), retention=st.sampled_from(list(Retention)))
def test_any_call_gives_an_exact_selection(
    policy: Registration, inputs: AttentionInputs, budget: int, retention: Retention
) -> None:
    compressor = resized(policy, budget, retention=retention.value)
    state = compressor.init_state()
    with unchanged(inputs):
        compressor.after_attention(inputs, state)
    held = inputs.holds.sum(1)
    budget = compressor.layer_budget(inputs)
    chosen = state.pending.get(inputs.layer.index)
    if chosen is None:
        assert int(held.max()) <= budget or (
            isinstance(compressor, AdaKVDecode) and int(held.sum()) <= budget * len(held)
        )
        return
    assert chosen.retention is retention and chosen.boundary == inputs.length
    if isinstance(compressor, AdaKVDecode):
        chosen.check(len(held), inputs.length)
        assert int(chosen.lengths.sum()) == len(held) * budget
        assert (chosen.lengths >= torch.minimum(held, torch.tensor(max(1, int(budget * 0.2))))).all()
        for head in range(len(held)):
            assert set(chosen.head(head).tolist()) <= set(inputs.head_positions(head).tolist())
    else:
        assert_selection(chosen, inputs, budget)


@pytest.mark.parametrize("policy", SCORED, ids=label)
def test_ties_go_to_the_lowest_position(policy: Registration) -> None:
    """All pairs alike: what is not forced in is taken from the left."""
    inputs = make_inputs(new_tokens=12, total_tokens=40)
    for tensor in (inputs.queries, inputs.keys, inputs.values):
        tensor[:] = 1.0
    compressor = resized(policy, 10)
    chosen = compressor.choose(inputs, torch.ones(2, 40), 10)
    assert chosen is not None
    forced = compressor.limits.recent_window
    assert chosen.head(0).tolist() == [*range(10 - forced), *range(40 - forced, 40)]


def script(seed: int = 0, length: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, length, 16, generator=source), torch.randn(2, 2, length, 16, generator=source)


def counts(talk: ScriptedConversation, layer: int) -> torch.Tensor:
    """Pairs that the next token will attend to, itself left out, per KV head."""
    cache = talk.cache.layers[layer]
    if cache.active is not None:
        chosen = cache.active.selection
        return chosen.lengths + cache.seen - chosen.boundary
    filler = cache.first_valid if cache.first_valid is not None else 0
    return torch.full((2,), cache.stored) - filler


@pytest.mark.parametrize(("policy", "retention"), BUDGETED)
def test_turn_after_turn_each_head_attends_to_its_budget(policy: Registration, retention: Retention) -> None:
    compressor = built(Kind.DECODE, spec(policy, retention))
    talk = ScriptedConversation(compressor, *script())
    for tokens in (50, 1, 30):
        talk.prefill(tokens)
        for output in range(8):
            expected = [expected_pairs(policy, talk, layer, output) for layer in range(2)]
            for layer, wanted in enumerate(expected):
                if wanted is not None:
                    assert counts(talk, layer).sum() == 2 * wanted, f"layer {layer}, output {output}"
            talk.decode()
        if retention is Retention.EVICT:
            assert all(layer.stored < 50 for layer in talk.cache.layers)


def expected_pairs(policy: Registration, talk: ScriptedConversation, layer: int, output: int) -> int | None:
    """Mean over the heads before an output is processed; None before a policy that waits for the query has acted."""
    if policy.name in ("quest", "rocketkv_mt"):
        if output == 0:
            return None
        return 24 if policy.name == "quest" else 16 + output
    if policy.name == "streaming_llm":
        return 23  # the next token's own pair is the 24th
    if policy.name in ("h2o", "tova"):
        return 24
    if policy.name == "rkv":
        return 24 + output % 5  # its interval
    if policy.name == "pyramidkv":
        return None  # below
    return 24 + output


@pytest.mark.parametrize("retention", list(Retention))
def test_the_pyramid_is_the_same_in_every_turn(retention: Retention) -> None:
    inner = {"policy": "snapkv", "budget": 24, "window": 4, "retention": retention.value}
    compressor = built(Kind.DECODE, {"policy": "pyramidkv", "beta": 4, "inner": inner})
    assert isinstance(compressor, PyramidKVDecode)
    budgets = pyramid(80, 24, 4, 4, 2)
    assert budgets == [42, 6] and sum(budgets) == 2 * 24
    talk = ScriptedConversation(compressor, *script())
    for tokens in (80, 30):
        talk.prefill(tokens)
        for layer, budget in enumerate(budgets):
            assert counts(talk, layer).tolist() == [budget, budget]


def test_adaptive_budgets_free_the_bytes_they_promise() -> None:
    """Heads that attend differently keep different numbers, and the store holds exactly the layer's budget."""
    queries, keys = script()
    queries[:, :2] = 0.0  # the first KV head's queries look at everything alike, the second's at few
    queries[:, 2:] *= 3.0
    inner = {"policy": "snapkv", "budget": 24, "window": 4, "kernel": 1, "retention": "evict"}
    talk = ScriptedConversation(built(Kind.DECODE, {"policy": "adakv", "inner": inner}), queries, keys)
    for tokens in (80, 40):
        talk.prefill(tokens)
        for layer in talk.cache.layers:
            assert layer.store is not None
            assert counts(talk, 0).sum() == 48 and counts(talk, 0).min() < counts(talk, 0).max()
            assert layer.store.nbytes == 48 * 2 * 16 * 4  # pairs x (key and value) x width x float32
        talk.decode(3)


def test_a_wrapper_around_a_rolling_policy_keeps_outputs_on_top() -> None:
    inner = {"policy": "h2o", "budget": 24}
    talk = ScriptedConversation(built(Kind.DECODE, {"policy": "adakv", "inner": inner}), *script())
    talk.prefill(50)
    talk.decode(5)
    assert counts(talk, 0).sum() == 2 * (24 + 5)


@pytest.mark.parametrize("policy", SCORED, ids=label)
def test_nothing_is_left_out_of_what_fits(policy: Registration) -> None:
    compressor = resized(policy, 40)
    inputs = make_inputs(new_tokens=10, total_tokens=40)
    state = compressor.init_state()
    compressor.after_attention(inputs, state)
    assert not state.pending


def test_small_policies_are_what_they_are_called() -> None:
    assert all(small(each).name == each.name for each in COMPRESSORS)
