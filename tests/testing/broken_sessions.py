"""Compressors that break one promise about their state."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import AttentionInputs, Phase, Selections, Step
from loopserve.core.policy.scoring import ScoredState
from tests.testing.honest import LargestKeys

_CALLS = itertools.count()
_SESSIONS = itertools.count()
_LAST_TURN: dict[tuple[int, int], Tensor] = {}
_TURNS: dict[int, int] = {}
_MINE = -1  # the note under which CountsTurnsElsewhere knows its session


class NeverTheSame(LargestKeys):
    """Draws its scores anew each time and does not declare it."""

    def score(self, inputs: AttentionInputs) -> Tensor:
        source = torch.Generator().manual_seed(next(_CALLS))
        return torch.rand(inputs.keys.shape[:2], generator=source)


class RemembersForEveryone(LargestKeys):
    """Keeps the direction of the last turn's keys in its module, one for all sessions, and ranks by it."""

    def score(self, inputs: AttentionInputs) -> Tensor:
        layer, mean = inputs.layer.index, inputs.keys.mean(1, keepdim=True)
        direction = _LAST_TURN.get((inputs.turn - 1, layer), torch.ones_like(mean))
        _LAST_TURN[inputs.turn, layer] = mean
        return (inputs.keys * direction).sum(-1)


@dataclass
class _Forgetful(ScoredState):
    def __deepcopy__(self, scratch: dict[int, Any]) -> _Forgetful:
        return _Forgetful()


class ForgetsWhenCopied(LargestKeys):
    """Plans a second selection for the third output, which a copy of the state knows nothing of."""

    def init_state(self) -> ScoredState:
        return _Forgetful()

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        scores = self.score(inputs)
        if self.retention is Retention.KEEP:
            state.statistics[inputs.layer.index] = self.choose(inputs, -scores, budget)
        return scores

    def after_forward(self, step: Step, state: ScoredState) -> Selections | None:
        if step.phase is Phase.DECODE and step.output_index == 3:
            planned, state.statistics = state.statistics, {}
            return planned or None
        return super().after_forward(step, state)


class PlansWithAFunction(LargestKeys):
    """Keeps in its state the function that the next turn's ranking goes by, which no file can hold."""

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        chosen: Any = state.statistics.get(inputs.layer.index, torch.abs)
        state.statistics[inputs.layer.index] = torch.square
        ranks: Tensor = chosen(self.score(inputs))
        return ranks


class CountsTurnsElsewhere(LargestKeys):
    """Counts the turns of a session beside its state, where an undone one is not taken back, and ranks by the count."""

    def init_state(self) -> ScoredState:
        return ScoredState(statistics={_MINE: next(_SESSIONS)})

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        if inputs.layer.index == 0:
            _TURNS[state.statistics[_MINE]] = _TURNS.get(state.statistics[_MINE], 0) + 1
        return self.score(inputs) * (-1) ** _TURNS[state.statistics[_MINE]]


class SelectsAtEveryChunk(LargestKeys):
    """Takes each chunk of a prompt for the last one."""

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        super().after_attention(replace(inputs, final=True), state)


class OwesBytes(LargestKeys):
    """Says that its state holds minus one byte."""

    def held_bytes(self, state: ScoredState) -> int:
        return -1


BROKEN = {
    "same_conversation_gives_the_same_selections": NeverTheSame,
    "interleaved_sessions_equal_solo_ones": RemembersForEveryone,
    "state_survives_a_fork": ForgetsWhenCopied,
    "state_can_be_written_to_disk": PlansWithAFunction,
    "an_undone_turn_leaves_no_trace": CountsTurnsElsewhere,
    "a_prompt_may_come_in_chunks": SelectsAtEveryChunk,
    "held_bytes_are_a_number": OwesBytes,
}
