"""Check a decode compressor's state: separate sessions, forks, and undone turns."""

from __future__ import annotations

import copy
import json
from typing import Any

from loopserve.core.policy.interfaces import Policy, Retention
from loopserve.testing.recorded import RecordedConversation, difference, held
from loopserve.testing.subject import NotApplicable, Subject


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
    same_conversation_gives_the_same_selections,
    interleaved_sessions_equal_solo_ones,
    state_survives_a_fork,
    state_can_be_written_to_disk,
    an_undone_turn_leaves_no_trace,
    a_prompt_may_come_in_chunks,
    held_bytes_are_a_number,
)
