"""One weight for all heads and layers: who attends to how much, what the mean is, and what a state carries."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from loopserve.core.policy.state import pack_state, types_within, unpack_state
from loopserve.kernels import backend
from loopserve.policies.decode.loopserve.policy import LoopServeDecode, LoopServeState
from loopserve.policies.decode.loopserve.threshold import ThresholdController
from loopserve.testing.scripted import ScriptedConversation
from tests.kernels.cases import FAST

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 2, 32
PROMPT, STEPS = 300, 120
PEAKED = 0  # the KV head whose queries are long, so that its attention lies on few pairs


def policy(**fields: Any) -> LoopServeDecode:
    small = {
        "budget": 48,
        "interval": 8,
        "first_block": "last_window",
        "hop_window": 8,
        "sink_tokens": 2,
        "recent_window": 4,
        "page_budget": 40,
        "page_budget_rule": "threshold",
        "page": 16,
        "key_bits": 8,
        "rescore": "codes",
    }
    return LoopServeDecode(LoopServeDecode.Config(**(small | fields)))


def talk(of: LoopServeDecode, seed: int = 0) -> ScriptedConversation:
    source = torch.Generator().manual_seed(seed)
    queries = torch.randn(LAYERS, KV_HEADS * GROUP, 2 * PROMPT + STEPS, DIM, generator=source)
    queries[:, PEAKED * GROUP : (PEAKED + 1) * GROUP] *= 4.0
    keys = torch.randn(LAYERS, KV_HEADS, 2 * PROMPT + STEPS, DIM, generator=source)
    found = ScriptedConversation(of, queries, keys)
    found.prefill(PROMPT)
    return found


def page_pairs(of: ScriptedConversation, layer: int = 0) -> list[int]:
    """Pairs that each head's last query chose beside the base."""
    chosen, base = of.active(layer), of.state.selections[layer]
    assert chosen is not None
    return (chosen.lengths - base.lengths).tolist()


def steps(of: ScriptedConversation, number: int) -> list[list[int]]:
    """Decode, and return the pairs of each head of all layers per step, but for those that a new base has replaced."""
    counts = []
    for _ in range(number):
        of.decode()
        if of.state.selected_at < of.output_index:
            counts.append([each for layer in range(LAYERS) for each in page_pairs(of, layer)])
    return counts


def test_a_flat_head_attends_to_more_than_a_peaked_one() -> None:
    of = talk(policy())
    counts = torch.tensor(steps(of, 40)).float().mean(0)
    for layer in range(LAYERS):
        assert counts[layer * KV_HEADS + PEAKED] < 0.7 * counts[layer * KV_HEADS + 1]


@pytest.mark.parametrize("scope", ["inputs", "all"])
@pytest.mark.parametrize("budget", [24, 48, 96])
def test_the_mean_is_the_budget(scope: str, budget: int) -> None:
    of = talk(policy(scope=scope, budget=budget, page_budget=budget - 8))
    of.decode(STEPS)
    outputs = 0.0 if scope == "all" else sum(range(1, STEPS + 1)) / STEPS  # attended on top
    mean = sum(of.attended) / STEPS - outputs
    assert 0.93 * budget < mean <= 1.01 * budget


def test_each_turn_begins_anew() -> None:
    of = talk(policy())
    of.decode(60)
    of.prefill(PROMPT)
    fresh = talk(policy())
    fresh.prefill(PROMPT)  # with no output before it
    assert of.state.controller.excess == 0.0 == fresh.state.controller.excess
    before = len(of.attended)
    of.decode(60)
    outputs = sum(range(1, 61)) / 60
    assert sum(of.attended[before:]) / 60 - outputs <= 1.02 * 48


def test_the_first_step_is_near_the_budget() -> None:
    """Its threshold is that of the last query of the prompt, over all layers and heads."""
    first = [sum(steps(talk(policy(), seed), 1)[0]) / (LAYERS * KV_HEADS) for seed in range(8)]
    assert 0.8 * 40 < sum(first) / len(first) < 1.25 * 40


@pytest.mark.parametrize(("least", "most"), [(0.0, 1.25), (0.5, 8.0), (0.5, 1.5), (1.0, 1.0)])
def test_no_head_leaves_the_bounds(least: float, most: float) -> None:
    compressor = policy(page_budget_least=least, page_budget_most=most)
    of = talk(compressor)
    for counts in steps(of, 30):
        assert all(int(least * 40) <= each <= int(most * 40) for each in counts)
    assert compressor.most_pairs == 8 + int(most * 40)


def test_where_attention_is_peaked_a_budget_is_not_spent() -> None:
    of = talk(policy(budget=299, page_budget=290))
    for counts in steps(of, 60):
        assert max(counts) <= PROMPT - 9
    assert of.state.controller.log_threshold == -16.0 and sum(counts) < LAYERS * KV_HEADS * (PROMPT - 9)


def test_steered_without_winding_up() -> None:
    """A budget that cannot be spent leaves little to spend later, and the threshold stays a number to be written."""
    controller = ThresholdController()
    controller.begin([torch.full((2, 3), float("-inf"))], 10)
    for _ in range(10_000):
        controller.add(0, 2)
        controller.end_step(10)
    assert controller.excess == -4.0 and controller.log_threshold == -16.0
    for _ in range(300):
        controller.add(2 * 40, 2)
        controller.end_step(10)
    assert controller.log_threshold == 0.0


def test_a_step_without_this_policy_moves_nothing() -> None:
    controller = ThresholdController(-3.0, 0.5)
    controller.end_step(10)
    assert controller == ThresholdController(-3.0, 0.5)


@pytest.mark.parametrize("implementation", FAST)
def test_every_implementation_gives_the_same_selections(implementation: str) -> None:
    """Pages of one key have exact codes, so nothing but the order of sums differs."""
    found = {}
    for name in ("reference", implementation):
        with backend.use(name):
            of = talk(policy(page=1))
            of.decode(40)
            found[name] = of
    one, other = found["reference"], found[implementation]
    assert one.attended == other.attended
    for layer in range(LAYERS):
        mine, theirs = one.active(layer), other.active(layer)
        assert mine is not None and theirs is not None and torch.equal(mine.indices, theirs.indices)
    assert one.state.controller.log_threshold == pytest.approx(other.state.controller.log_threshold, abs=1e-5)


def test_a_copied_or_written_state_goes_on_alike() -> None:
    of = talk(policy())
    of.decode(21)
    kinds = types_within(LoopServeState)
    state = copy.copy(of.state)
    state.layer_inputs = {}
    tree, tensors = pack_state(state, kinds)
    read = unpack_state(json.loads(json.dumps(tree, allow_nan=False)), tensors, kinds)
    assert read.controller == of.state.controller
    forked = copy.deepcopy(state)
    others = []
    for each in (read, forked):
        other = talk(policy())
        other.decode(21)
        other.state = each
        others.append(steps(other, 20))
    assert others[0] == others[1] == steps(of, 20)


def test_what_it_needs_is_named() -> None:
    for fields in ({"key_bits": 0, "rescore": "keys"}, {"trigger": "drift", "rescore": "keys"}):
        with pytest.raises(ValueError, match="page_budget_rule: threshold needs"):
            policy(**fields)
