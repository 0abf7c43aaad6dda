"""Check a decode compressor: form and budget of selections, forced and evicted pairs, and the state of its sessions."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Policy
from loopserve.core.policy.interfaces import DecodeCompressor, Observation, Phase, Step
from loopserve.core.policy.scoring import ScoredCompressor
from loopserve.testing.inputs import make_inputs
from loopserve.testing.scripted import RecordedConversation, difference, held
from loopserve.testing.subject import NotApplicable, Subject, budget_of, evicting, forced_of

LONG_ANSWER = 1000


def _budget(subject: Subject) -> int:
    budget = budget_of(subject.compressor)
    if budget is None:
        raise NotApplicable("it has no budget in tokens")
    return budget


def _evicting(subject: Subject) -> DecodeCompressor[Any]:
    if Retention.EVICT not in subject.policy.effective_capabilities.retentions:
        raise NotApplicable("it does not evict")
    found = evicting(subject.compressor)
    if found is None:
        raise NotApplicable("no single option makes it evict: give an object that does")
    return found


def selections_have_the_right_form(subject: Subject) -> None:
    """Check that each selection is a KVSelection with int64 indices [Hkv, S] and one length per KV head."""
    talk = RecordedConversation(subject.compressor, *subject.script()).run(subject.steps)
    assert not talk.malformed, talk.malformed[0]
    talk.well_formed()


def selections_are_for_its_own_layers(subject: Subject) -> None:
    """Check that selections are given only for the layers of the compressor."""
    talk = RecordedConversation(subject.compressor, *subject.script()).run(subject.steps)
    assert not talk.strangers, f"it answered for layer {talk.strangers[0]}, the model has {len(talk.layers)}"


def selections_are_sorted(subject: Subject) -> None:
    """Check that the positions of each head are in ascending order."""
    for given in held(subject).given:
        for kept in given.heads:
            assert not (kept[1:] < kept[:-1]).any(), f"layer {given.layer}, turn {given.turn}: {kept.tolist()[:12]}"


def selections_are_unique(subject: Subject) -> None:
    """Check that no head keeps a position twice."""
    for given in held(subject).given:
        for kept in given.heads:
            twice = kept.numel() - kept.unique().numel()
            assert not twice, f"layer {given.layer}, turn {given.turn}: {twice} positions are there twice"


def selections_are_in_range(subject: Subject) -> None:
    """Check that positions lie from 0 to below the boundary, and the boundary within the tokens seen."""
    for given in held(subject).given:
        boundary = given.selection.boundary
        assert 0 <= boundary <= given.length, f"boundary {boundary} is outside the {given.length} tokens seen"
        for kept in given.heads:
            wrong = kept[(kept < 0) | (kept >= boundary)]
            assert not len(wrong), f"layer {given.layer}, turn {given.turn}: {wrong.tolist()} outside [0, {boundary})"


def budget_is_exact(subject: Subject) -> None:
    """Check that the first output of a turn attends to exactly the budget, besides its own pair, mean over heads and layers."""
    budget, talk = _budget(subject), held(subject)
    first = 0
    for number, (_, outputs) in enumerate(subject.steps[1::2]):
        attended = talk.attended[first]
        assert budget <= attended <= budget + 1, f"turn {number}: {attended:g} pairs attended, the budget is {budget}"
        first += outputs


def nothing_is_selected_within_the_budget(subject: Subject) -> None:
    """Check that a conversation that fits the budget is attended to whole: the compressor returns None."""
    budget = _budget(subject)
    if budget < 8:
        raise NotApplicable(f"a budget of {budget} is too small to stay within")
    talk = RecordedConversation(subject.compressor, *subject.script())
    talk.run((("prefill", budget - 4), ("decode", 2)))
    assert not talk.given, f"{budget - 4} tokens, a budget of {budget}, and yet {len(talk.given)} selections"


def a_thousand_outputs_stay_in_budget(subject: Subject) -> None:
    """Check that over an answer of 1,000 outputs the attended pairs never exceed the budget and the outputs themselves."""
    budget = _budget(subject)
    prompt = subject.steps[0][1]
    script = subject.script(layers=1, tokens=prompt + LONG_ANSWER)
    talk = RecordedConversation(subject.compressor, *script).run((("prefill", prompt), ("decode", LONG_ANSWER)))
    talk.well_formed()
    for output, attended in enumerate(talk.attended):
        most = budget + output + 1
        assert attended <= most, f"output {output} attends to {attended:g} pairs, at most {most} are allowed"


def sinks_are_kept(subject: Subject) -> None:
    """Check that with the option `sink_tokens`, every head of every selection keeps the first tokens of the conversation."""
    sinks = forced_of(subject.compressor, "sink_tokens")
    if not sinks:
        raise NotApplicable("it has no sink_tokens")
    for given in held(subject).given:
        _assert_kept(
            torch.arange(sinks, device="cpu"),
            given.heads,
            given.selection.boundary,
            f"turn {given.turn}, layer {given.layer}",
        )


def recent_window_is_kept(subject: Subject) -> None:
    """Check that with the option `recent_window`, the last tokens of the input are in the selection at the beginning of an answer."""
    recent = forced_of(subject.compressor, "recent_window")
    if not recent:
        raise NotApplicable("it has no recent_window")
    for given in held(subject).given:
        if given.output_index == 0:
            wanted = torch.arange(max(given.input_end - recent, 0), given.input_end, device="cpu")
            _assert_kept(wanted, given.heads, given.selection.boundary, f"turn {given.turn}, layer {given.layer}")


def _assert_kept(wanted: Tensor, heads: list[Tensor], boundary: int, where: str) -> None:
    """Assert that every head keeps the positions, or that they lie behind the boundary and are attended anyway."""
    for number, kept in enumerate(heads):
        missing = wanted[~torch.isin(wanted, kept) & (wanted < boundary)]
        assert not len(missing), f"{where}, head {number}: positions {missing.tolist()} are left out"


def filler_is_never_selected(subject: Subject) -> None:
    """Check that a head that holds fewer pairs behind filler selects only pairs that it holds (scored policies only)."""
    compressor = subject.compressor
    if not isinstance(compressor, ScoredCompressor):
        raise NotApplicable("no wrapper can make its heads ragged")
    inputs = make_inputs(new_tokens=20, total_tokens=60, turn=1, evicted=8, ragged=5)
    state = compressor.init_state()
    compressor.after_attention(inputs, state)
    answer = compressor.after_forward(
        Step(Phase.PREFILL, 1, inputs.turn_start, inputs.length, 0, True, (inputs.layer,), inputs.record), state
    )
    if not answer or isinstance(answer, Observation):
        raise NotApplicable("it selects nothing of 60 pairs")
    for selection in answer.values():
        for head in range(len(selection.lengths)):
            stored = inputs.head_positions(head)
            kept = selection.head(head)
            kept = kept[kept < selection.boundary]
            wrong = kept[(kept < 0) | ~torch.isin(kept, stored)]
            assert not len(wrong), f"head {head} selects {wrong.tolist()[:8]}, which it does not hold"


def retention_is_as_declared(subject: Subject) -> None:
    """Check that every selection has the retention that the policy declares, and its capabilities allow it."""
    variants = [subject.compressor]
    if Retention.EVICT in subject.policy.effective_capabilities.retentions:
        variants += [each for each in [evicting(subject.compressor)] if each is not None]
    for compressor in variants:
        declared = compressor.retention
        assert declared in compressor.effective_capabilities.retentions, f"{declared} is not among its capabilities"
        for given in held(subject, compressor=compressor).given:
            stated = given.selection.retention
            assert stated is declared, f"declares {declared}, but a selection of turn {given.turn} says {stated}"


def evicted_pairs_stay_gone(subject: Subject) -> None:
    """Check that under retention evict, a pair that was evicted is never selected again."""
    talk = held(subject, compressor=_evicting(subject))
    assert not talk.gone, f"selected after their eviction: {talk.gone[0]}"


def evicted_bytes_are_freed(subject: Subject) -> None:
    """Check that under retention evict the store shrinks to what was selected, and the state holds no part of the old store."""
    talk = _Keepsake(_evicting(subject), *subject.script())
    talk.prefill(subject.steps[0][1])
    talk.well_formed()
    for layer in talk.cache.layers:  # some heads may keep every pair, which leaves as many columns as before
        assert layer.store is not None
        whole = layer.store.heads * talk.cache.seen
        assert layer.store.pairs < whole, f"the store still holds all {whole} pairs of {layer.store.heads} heads"
    old = {each.untyped_storage().data_ptr() for each in talk.old}
    kept = [each for each in tensors(talk.state) if each.untyped_storage().data_ptr() in old]
    assert not kept, f"the state still holds a tensor {list(kept[0].shape)} of the old store"


class _Keepsake(RecordedConversation):
    """Keep every store that a selection ends, so that its address is not used again."""

    def __init__(self, compressor: DecodeCompressor[Any], queries: Tensor, keys: Tensor) -> None:
        super().__init__(compressor, queries, keys)
        self.old: list[Tensor] = []

    def take(self, layer: int, selection: KVSelection) -> None:
        store = self.cache.layers[layer].store if 0 <= layer < len(self.layers) else None
        if store is not None:
            self.old += [store.keys, store.values]
        super().take(layer, selection)


def tensors(value: Any, known: set[int] | None = None) -> list[Tensor]:
    """Return every tensor that a state holds, at any depth."""
    known = set() if known is None else known
    if id(value) in known:
        return []
    known.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inside = list(value)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        inside = list(vars(value).values())
    return [tensor for each in inside for tensor in tensors(each, known)]


def same_conversation_gives_the_same_selections(subject: Subject) -> None:
    """Check that equal conversations get equal selections, unless the policy declares that it is not deterministic."""
    if not subject.policy.effective_capabilities.deterministic:
        raise NotApplicable("it declares that it is not deterministic")
    found = difference(held(subject), held(subject))
    assert found is None, found


def _alone(subject: Subject, seed: int = 0) -> RecordedConversation:
    """Return a conversation of one session. Raises NotApplicable if a second one differs, since a comparison then proves nothing."""
    alone = held(subject, seed)
    if difference(alone, held(subject, seed)) is not None:
        raise NotApplicable("it is not deterministic, so a difference would say nothing")
    return alone


def interleaved_sessions_equal_solo_ones(subject: Subject) -> None:
    """Check that two sessions that alternate get the selections that each gets alone, from one policy object."""
    alone = [_alone(subject, seed) for seed in (0, 1)]
    mixed = [RecordedConversation(subject.compressor, *subject.script(seed)) for seed in (0, 1)]
    for step in subject.steps:
        for talk in mixed:
            talk.run((step,))
    for number, (solo, talk) in enumerate(zip(alone, mixed, strict=True)):
        found = difference(solo, talk)
        assert found is None, f"conversation {number}: {found}"


def state_survives_a_fork(subject: Subject) -> None:
    """Check that a deep copy of the state continues as the state itself would, at any time."""
    alone = _alone(subject)
    forked = RecordedConversation(subject.compressor, *subject.script()).run(subject.steps, fork=True)
    found = difference(alone, forked)
    assert found is None, found


def state_can_be_written_to_disk(subject: Subject) -> None:
    """Check that a state can be written as JSON and tensors after each step, and continues equally after it is read again."""
    alone = _alone(subject)
    written = RecordedConversation(subject.compressor, *subject.script())
    for step in subject.steps:
        written.run((step,))
        written.state = written_and_read(subject.policy, written.state)
    found = difference(alone, written)
    assert found is None, found


def written_and_read(policy: Policy, state: Any) -> Any:
    """Return a policy's state after it was written to a file and read again."""
    tree, tensors = policy.pack_state(state)
    return policy.unpack_state((json.loads(json.dumps(tree, allow_nan=False)), tensors))


def an_undone_turn_leaves_no_trace(subject: Subject) -> None:
    """Check that a turn that is undone, with state and cache as they were before it, has no effect on later selections."""
    plain = _alone(subject)
    undone = RecordedConversation(subject.compressor, *subject.script()).run(subject.steps[:2])
    undone.cache.release()
    before, seen, given = copy.deepcopy(undone.state), undone.cache.seen, len(undone.given)
    kept = undone.cache.fork() if subject.compressor.retention is Retention.EVICT else None  # as a session does it
    queries = undone.queries
    undone.queries = queries.flip(2)
    undone.run((("prefill", 30), ("decode", 7)))
    undone.queries = queries
    if kept is None:
        undone.cache.truncate(seen)
    else:
        undone.cache = kept
    undone.state, undone.turn = before, 0
    del undone.given[given:]
    found = difference(plain, undone.run(subject.steps[2:]))
    assert found is None, found


def a_prompt_may_come_in_chunks(subject: Subject) -> None:
    """Check that a turn that is read in chunks selects nothing before the last chunk, which gives the usual selections."""
    held(subject)
    talk = RecordedConversation(subject.compressor, *subject.script())
    prompt = subject.steps[0][1]
    talk.prefill(prompt, [prompt // 3, prompt // 3, prompt - 2 * (prompt // 3)])
    talk.decode()
    early = [given.length for given in talk.given if given.length < prompt]
    assert not early, f"a selection after {early[0]} of {prompt} tokens of the turn"
    assert talk.given or talk.malformed, "no selection after the last chunk, though there is one without chunks"


def held_bytes_are_a_number(subject: Subject) -> None:
    """Check that the bytes that the state holds beside the store are a whole number, from 0 up, at any time."""
    talk = RecordedConversation(subject.compressor, *subject.script())
    for steps in (subject.steps[:0], subject.steps[:2]):
        given = subject.compressor.held_bytes(talk.run(steps).state)
        assert isinstance(given, int) and given >= 0, f"held_bytes says {given!r}"


CHECKS = (
    selections_have_the_right_form,
    selections_are_for_its_own_layers,
    selections_are_sorted,
    selections_are_unique,
    selections_are_in_range,
    budget_is_exact,
    nothing_is_selected_within_the_budget,
    a_thousand_outputs_stay_in_budget,
    sinks_are_kept,
    recent_window_is_kept,
    filler_is_never_selected,
    retention_is_as_declared,
    evicted_pairs_stay_gone,
    evicted_bytes_are_freed,
    same_conversation_gives_the_same_selections,
    interleaved_sessions_equal_solo_ones,
    state_survives_a_fork,
    state_can_be_written_to_disk,
    an_undone_turn_leaves_no_trace,
    a_prompt_may_come_in_chunks,
    held_bytes_are_a_number,
)
