"""Progressive KV compression: what is found, what is remembered, what comes back, what is shared."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from loopserve import Engine
from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor
from loopserve.policies.decode.loopserve.policy import LoopServeDecode
from loopserve.policies.decode.snapkv import SnapKVDecode
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.planted import KV_HEADS, LAYERS, Script, kept, lost

FACT, OTHER = range(60, 66), range(120, 126)
QUESTION = range(205, 210)
FIRST, SECOND = 200, 100  # tokens of the two turns
ANSWER = FIRST + SECOND


def loopserve(**fields: Any) -> LoopServeDecode:
    small = {"budget": 40, "interval": 4, "hop_window": 8, "hop_rows": 8, "recent_window": 4, "sink_tokens": 2}
    return LoopServeDecode(LoopServeDecode.Config(**(small | fields)))


def question_first() -> Script:
    """Turn two asks for the fact in its first rows; its last rows only look back at the question."""
    script = Script()
    script.tell(0, FACT)
    script.look(0, QUESTION)
    script.tell(1, QUESTION)
    script.look(1, range(ANSWER - 8, ANSWER))
    return script


def two_facts() -> Script:
    """The question's last rows look for two facts; the answer's first eight outputs look for one, the next for the
    other.
    """
    script = Script()
    script.tell(0, FACT)
    script.tell(1, OTHER)
    script.look(0, range(ANSWER - 8, ANSWER))
    script.look(1, range(ANSWER - 8, ANSWER))
    script.look(0, range(ANSWER, ANSWER + 8))
    script.look(1, range(ANSWER + 8, ANSWER + 16))
    return script


def converse(policy: DecodeCompressor[Any], script: Script, steps: int = 0) -> ScriptedConversation:
    talk = ScriptedConversation(policy, script.queries, script.keys, scaling=1.0)
    talk.prefill(FIRST)
    talk.prefill(SECOND)
    talk.decode(steps)
    return talk


def indices(talk: ScriptedConversation, layer: int = 0) -> torch.Tensor:
    selection = talk.active(layer)
    assert selection is not None
    return selection.indices


def test_two_hop_finds_the_question_and_what_it_points_to() -> None:
    talk = converse(loopserve(), question_first())
    assert set(QUESTION) <= set(talk.observed[-1].tolist())
    assert all(kept(indices(talk, layer), FACT) for layer in range(LAYERS))


def test_the_last_window_alone_does_not() -> None:
    assert lost(indices(converse(loopserve(first_block="last_window"), question_first())), FACT)
    snapkv = SnapKVDecode(SnapKVDecode.Config(budget=40, window=8))
    assert lost(indices(converse(snapkv, question_first())), FACT)


@pytest.mark.parametrize("chunks", [[60, 40], [99, 1], [25, 25, 25, 25]])
def test_two_hop_finds_it_in_chunked_prefills_too(chunks: list[int]) -> None:
    script = question_first()
    talk = ScriptedConversation(loopserve(), script.queries, script.keys, scaling=1.0)
    talk.prefill(FIRST)
    talk.prefill(SECOND, chunks)
    assert set(QUESTION) <= set(talk.observed[-1].tolist())
    assert kept(indices(talk), FACT)


def test_kept_queries_give_what_running_the_rows_again_gives() -> None:
    again = converse(loopserve(second_hop="again"), question_first(), steps=6)
    kept_ = converse(loopserve(second_hop="kept"), question_first(), steps=6)
    assert again.observed and not kept_.observed
    assert_same(again.selections, kept_.selections)
    assert all(call.new_tokens == 1 for call in kept_.state.layer_inputs.values())


@pytest.mark.parametrize(("chunks", "again"), [([100], 0), ([3, 97], 0), ([60, 40], 1), ([98, 2], 1)])
def test_rows_of_earlier_chunks_are_run_again_even_if_queries_are_kept(chunks: list[int], again: int) -> None:
    script = question_first()
    script.look(0, [FIRST + 4, FIRST + 10, FIRST + 11])  # with the question, the only rows that are looked at
    script.tell(1, [FIRST + 4, FIRST + 10, FIRST + 11])
    talk = ScriptedConversation(loopserve(second_hop="kept"), script.queries, script.keys, scaling=1.0)
    talk.prefill(FIRST)
    talk.observed.clear()
    talk.prefill(SECOND, chunks)
    assert len(talk.observed) == again
    assert kept(indices(talk), FACT) and indices(talk).shape[1] == 40


def test_observed_rows_belong_to_the_turn_and_are_sorted() -> None:
    for rows in converse(loopserve(), question_first()).observed:
        assert (rows[1:] > rows[:-1]).all() and len(rows) == 8
    assert rows[0] >= FIRST and rows[-1] < ANSWER - 8


@pytest.mark.parametrize("new", [1, 3, 8, 9])
def test_a_turn_no_longer_than_the_window_needs_no_second_hop(new: int) -> None:
    script = two_facts()
    talk = ScriptedConversation(loopserve(), script.queries, script.keys, scaling=1.0)
    talk.prefill(ANSWER - new)
    before = len(talk.observed)
    talk.prefill(new)
    assert len(talk.observed) - before == (1 if new > 8 else 0)
    assert indices(talk).shape[1] == 40


@pytest.mark.parametrize("first_block", ["two_hop", "last_window", "sampled", "dense"])
@pytest.mark.parametrize("share", ["none", "heads", "layer_groups", "all"])
@pytest.mark.parametrize("scope", ["inputs", "all"])
def test_every_selection_is_sorted_unique_and_of_the_exact_budget(first_block: str, share: str, scope: str) -> None:
    policy = loopserve(first_block=first_block, share=share, scope=scope, layer_group=1)
    talk = converse(policy, two_facts(), steps=12)
    assert talk.selections
    for answer in talk.selections:
        assert set(answer) == set(range(LAYERS))
        for selection in answer.values():
            selection.check(KV_HEADS, ANSWER + 12)
            assert selection.indices.shape[1] == 40 and not selection.ragged
            forced = [0, 1, *range(selection.boundary - 4, selection.boundary)]
            assert kept(selection.indices, forced)
            assert selection.boundary == ANSWER or scope == "all" or selection.boundary == FIRST


def test_a_dense_first_block_is_dense_until_the_interval_has_passed() -> None:
    talk = converse(loopserve(first_block="dense"), two_facts(), steps=3)
    assert talk.active() is None
    talk.decode()
    assert talk.active() is not None


def test_scope_all_bounds_what_a_long_answer_attends_to() -> None:
    talk = converse(loopserve(scope="all"), two_facts(), steps=40)
    selection = talk.active()
    assert selection is not None and selection.boundary == ANSWER + 40


@pytest.mark.parametrize("scope", ["inputs", "all"])
def test_a_budget_that_holds_everything_selects_nothing(scope: str) -> None:
    talk = converse(loopserve(budget=ANSWER + 20, scope=scope), two_facts(), steps=20)
    assert talk.active() is None and not talk.selections and not talk.observed


def test_memory_keeps_what_the_question_pointed_to() -> None:
    for memory, remembered in ((0.9, True), (0.0, False)):
        talk = converse(loopserve(first_block="last_window", memory=memory, pooling=1, budget=18), two_facts(), steps=4)
        assert kept(indices(talk), FACT)
        assert kept(indices(talk), OTHER) is remembered


def test_a_full_pool_brings_a_dropped_pair_back_and_an_active_one_cannot() -> None:
    script = two_facts()
    script.queries[:, :, ANSWER - 8 : ANSWER, 1] = 0.0  # the question no longer mentions the other fact
    stored = {}
    for pool in ("full", "active"):
        policy = loopserve(pool=pool, first_block="last_window", memory=0.0, pooling=1)
        talk = ScriptedConversation(policy, script.queries, script.keys, scaling=1.0)
        talk.prefill(ANSWER)
        assert lost(talk.selections[-1][0].indices, OTHER) and kept(talk.selections[-1][0].indices, FACT)
        talk.decode(12)
        stored[pool] = talk.cache.layers[0].stored
        if pool == "full":
            assert kept(indices(talk), OTHER)
        else:
            assert lost(talk.cache.layers[0].positions(), OTHER)
    assert stored == {"full": ANSWER + 12, "active": 40 + 12}


def test_an_active_pool_with_scope_all_bounds_the_store() -> None:
    talk = converse(loopserve(pool="active", scope="all"), two_facts(), steps=30)
    assert talk.cache.layers[0].stored <= 40 + 4
    talk.prefill(30)
    talk.decode(5)
    assert talk.cache.layers[0].stored <= 40 + 4


@pytest.mark.parametrize("share", ["none", "all"])
def test_an_active_pool_goes_on_over_the_survivors_in_the_next_turn(share: str) -> None:
    script = two_facts()
    script.look(0, [*range(FIRST - 8, FIRST), *range(ANSWER + 38, ANSWER + 46)])
    talk = converse(loopserve(pool="active", share=share), script, steps=6)
    talk.prefill(40)
    for layer in talk.cache.layers:
        assert layer.positions().shape == (KV_HEADS, 40)
        assert kept(layer.positions(), FACT)


def test_sharing_gives_a_head_what_another_has_seen() -> None:
    script = Script()
    script.tell(0, FACT)
    script.look(0, range(ANSWER - 8, ANSWER), layers=[1])  # only the second layer looks at it
    shared = converse(loopserve(share="all"), script)
    alone = converse(loopserve(share="none"), script)
    grouped = converse(loopserve(share="layer_groups", layer_group=1), script)
    assert all(kept(indices(talk, 1), FACT) for talk in (shared, alone, grouped))
    assert kept(indices(shared, 0), FACT)
    assert lost(indices(alone, 0), FACT) and lost(indices(grouped, 0), FACT)
    assert torch.equal(indices(shared, 0), indices(shared, 1))


def test_a_new_turn_starts_from_scratch() -> None:
    script = two_facts()
    script.tell(2, range(310, 314))
    script.look(2, range(332, 340))
    talk = converse(loopserve(memory=1.0, first_block="last_window", budget=18, pooling=1), script, steps=10)
    assert kept(indices(talk), OTHER)
    talk.prefill(30)
    assert kept(indices(talk), range(310, 314)) and lost(indices(talk), OTHER)


def test_choices_can_be_repeated_and_a_copied_state_goes_on_alike() -> None:
    script = two_facts()
    policy = loopserve(trigger="drift", page_budget=8)
    one, two = converse(policy, script, steps=5), converse(policy, script, steps=5)
    two.state = copy.deepcopy(two.state)
    one.decode(9)
    two.decode(9)
    assert_same(one.selections, two.selections)
    assert torch.equal(indices(one), indices(two))


def test_two_conversations_under_one_policy_do_not_meet() -> None:
    policy = loopserve(trigger="drift", page_budget=8)
    scripts = question_first(), two_facts()
    alone = [converse(policy, script, steps=10) for script in scripts]
    together = [ScriptedConversation(policy, script.queries, script.keys, scaling=1.0) for script in scripts]
    for tokens in (FIRST, SECOND):
        for talk in together:
            talk.prefill(tokens)
    for _ in range(10):
        for talk in together:
            talk.decode()
    for one, two in zip(alone, together, strict=True):
        assert_same(one.selections, two.selections)


def assert_same(one: list[dict[int, KVSelection]], two: list[dict[int, KVSelection]]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        assert all(torch.equal(left[layer].indices, right[layer].indices) for layer in left | right)


def test_what_was_done_is_recorded() -> None:
    talk = converse(loopserve(), two_facts(), steps=8)
    assert talk.record.counters["reselections"] == 2
    assert all(0 <= float(value.min()) <= float(value.max()) <= 1 for value in talk.record.values["overlap"])
    assert float(talk.record.values["recovered_mass"][-1].min()) > 0.5
    assert talk.record.bytes["scoring"] > 0 and "summaries" not in talk.record.bytes


def test_an_observation_that_another_policy_asked_for_is_not_taken_in() -> None:
    script = two_facts()
    talk = converse(loopserve(first_block="last_window"), script)
    before = {unit: held.clone() for unit, held in talk.state.scores.accumulated.items()}
    from loopserve.core.policy.interfaces import Phase  # the engine shows an observation to every compressor

    inputs = talk._inputs(talk.layers[0], Phase.OBSERVE, torch.arange(205, 210), final=True)
    talk.compressor.after_attention(inputs, talk.state)
    assert not talk.state.scores.current
    assert all(torch.equal(before[unit], talk.state.scores.accumulated[unit]) for unit in before)


def test_sampled_rows_are_its_own_whatever_prefill_policy_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = AttentionInputs.row_attention

    def counted(self: AttentionInputs, rows: Any) -> Any:
        looked.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(AttentionInputs, "row_attention", counted)
    prefill = {"policy": "loopserve", "sample_rows": 40, "dense_above": 1.0}
    decode = {"policy": "loopserve", "budget": 32, "first_block": "sampled", "hop_rows": 5}
    engine = Engine.from_pretrained("demo", {"version": 1, "name": "s", "prefill": prefill, "decode": decode})
    with engine.session() as chat:
        chat.send("we had soup for lunch today . " * 20, max_new_tokens=2)
    assert looked and looked[-len(engine.token_engine.model.layers) :] == [5] * len(engine.token_engine.model.layers)
