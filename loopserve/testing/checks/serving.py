"""Check that a policy changes only its session's state while it serves."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from loopserve.core.policy.interfaces import (
    AttentionInputs,
    DecodeCompressor,
    KVSelection,
    Observation,
    Selections,
    Step,
)
from loopserve.testing.assertions import unchanged
from loopserve.testing.checks.calls import attended, first_turn
from loopserve.testing.recorded import RecordedConversation
from loopserve.testing.subject import Subject

_SEED = 86243  # a value that no policy is likely to set itself


def policy_object_stays_as_it_is(subject: Subject) -> None:
    """Check that serving changes no attribute of the policy object, since one object serves every session."""
    before = {name: snapshot(value) for name, value in vars(subject.policy).items()}
    _serve(subject)
    after = {name: snapshot(value) for name, value in vars(subject.policy).items()}
    touched = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not touched, f"changed while serving: {', '.join(touched)}"


def random_state_is_left_alone(subject: Subject) -> None:
    """Check that a draw comes from a generator of the policy's own: the global states of torch and of Python stay as they are."""
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            random.seed(_SEED)
            before = torch.random.get_rng_state(), random.getstate()
            _serve(subject)
            assert torch.equal(before[0], torch.random.get_rng_state()), "torch's global random state moved"
            assert before[1] == random.getstate(), "the global random state of Python moved"
    finally:
        random.setstate(python)


def inputs_stay_unchanged(subject: Subject) -> None:
    """Check that no tensor of a call is written to, neither by choosing nor by attending."""
    if isinstance(subject.policy, DecodeCompressor):
        watched = _Watched(subject.policy)
        RecordedConversation(watched, *subject.script()).run(subject.steps[:2])
        return
    inputs = first_turn()
    with unchanged(inputs):
        attended(subject.sparsifier.sparsify(inputs), inputs)


def _serve(subject: Subject) -> None:
    if isinstance(subject.policy, DecodeCompressor):
        RecordedConversation(subject.policy, *subject.script()).run(subject.steps[:2])
    else:
        inputs = first_turn()
        attended(subject.sparsifier.sparsify(inputs), inputs)


class _Watched(DecodeCompressor[Any]):
    """Pass every call on to a compressor and assert that no tensor of the call is written to."""

    def __init__(self, watched: DecodeCompressor[Any]) -> None:
        super().__init__(watched.config)
        self.watched = watched

    @property
    def dense_below_tokens(self) -> int:
        return self.watched.dense_below_tokens

    def init_state(self) -> Any:
        return self.watched.init_state()

    def end_turn(self, state: Any) -> None:
        self.watched.end_turn(state)

    def before_attention(self, inputs: AttentionInputs, state: Any) -> KVSelection | None:
        with unchanged(inputs):
            return self.watched.before_attention(inputs, state)

    def after_attention(self, inputs: AttentionInputs, state: Any) -> None:
        with unchanged(inputs):
            self.watched.after_attention(inputs, state)

    def after_forward(self, step: Step, state: Any) -> Selections | Observation | None:
        return self.watched.after_forward(step, state)


def snapshot(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return a copy of a value in a form that can be compared, and that later changes of the value do not affect."""
    if id(value) in above:
        return "a value that holds itself"
    above = (*above, id(value))
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), tuple(map(str, value.detach().flatten().tolist()))
    if isinstance(value, torch.Generator):
        return tuple(value.get_state().tolist())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, dict):
        return tuple((repr(key), snapshot(each, above)) for key, each in value.items())
    if isinstance(value, set | frozenset):
        return frozenset(map(repr, value))
    if isinstance(value, list | tuple):
        return tuple(snapshot(each, above) for each in value)
    if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        return type(value).__qualname__, snapshot(vars(value), above)
    return repr(value)


CHECKS = (policy_object_stays_as_it_is, random_state_is_left_alone, inputs_stay_unchanged)
