"""One conversation as tokens: its cache, its policies' states, its turns. Knows no text and runs no model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopserve.core.cache import KVCache
from loopserve.core.errors import CacheError, InputError
from loopserve.core.interfaces import DecodeCompressor, LayerSpec, LayerType, Phase, PrefillSparsifier, Retention
from loopserve.core.stack import PolicyStack
from loopserve.core.stats import TurnStats


@dataclass(frozen=True)
class LayerPolicies:
    """Who acts in one layer. ``sparsifier`` and ``compressor`` are None where the layer stays as the model has it."""

    spec: LayerSpec
    sparsifier: PrefillSparsifier | None
    compressor: DecodeCompressor[Any] | None
    watches_before: bool  # the compressor overrides before_attention
    watches_after: bool


def assign(layers: Sequence[LayerSpec], stack: PolicyStack) -> tuple[LayerPolicies, ...]:
    """The stack's policies layer by layer; only full-attention layers get any."""
    total = len(layers)
    assigned = []
    for layer in layers:
        if layer.type is not LayerType.FULL:
            assigned.append(LayerPolicies(layer, None, None, watches_before=False, watches_after=False))
            continue
        compressor = stack.decode_for(layer.index, total)
        assigned.append(
            LayerPolicies(
                layer,
                stack.prefill_for(layer.index, total),
                compressor,
                watches_before=type(compressor).before_attention is not DecodeCompressor.before_attention,
                watches_after=type(compressor).after_attention is not DecodeCompressor.after_attention,
            )
        )
    return tuple(assigned)


@dataclass
class _TurnStart:
    """What a turn began with, so that it can be taken back."""

    tokens: int
    cached: int
    states: dict[int, Any]
    cache: KVCache | None  # a copy, only where the stack evicts: an eviction cannot be undone otherwise


class Session:
    """Tokens, cache, policy states and turns of one conversation. Two sessions share nothing that changes."""

    def __init__(self, policies: tuple[LayerPolicies, ...]) -> None:
        self.policies = policies
        self.cache = KVCache(len(policies))
        self.tokens: list[int] = []
        self.turns: list[TurnStats] = []
        self.output_index = 0
        self.turn_start = 0
        self.answering = False  # an answer is being written: no other turn may begin, end or be copied
        self._starts: list[_TurnStart] = []
        self._ruled: dict[int, list[LayerSpec]] = {}
        self.compressors: dict[int, DecodeCompressor[Any]] = {}
        for policy in policies:
            if policy.compressor is not None:
                self.compressors[id(policy.compressor)] = policy.compressor
                self._ruled.setdefault(id(policy.compressor), []).append(policy.spec)
        self.states: dict[int, Any] = {key: each.init_state() for key, each in self.compressors.items()}
        self.states |= {id(each.sparsifier): {} for each in policies if each.sparsifier is not None}

    @property
    def stats(self) -> TurnStats:
        """Figures of the turn under way, or of the last one."""
        return self.turns[-1]

    @property
    def evicts(self) -> bool:
        return any(each.retention is Retention.EVICT for each in self.compressors.values())

    def ruled_by(self, key: int) -> tuple[LayerSpec, ...]:
        """The layers of one compressor."""
        return tuple(self._ruled[key])

    def require_rest(self) -> None:
        """InputError while an answer is being written."""
        if self.answering:
            raise InputError("an answer is still being written: read it to its end, or close its stream, first")

    def begin_turn(self, new_tokens: Sequence[int], *, undoable: bool = True) -> None:
        """Take in the tokens a turn adds; they are not computed yet.

        undoable: under an evicting stack, keep a copy of the survivors, so that the turn can be taken back.
        """
        self.require_rest()
        self.cache.release()
        kept = self.cache.fork() if self.evicts and undoable else None
        self._starts.append(_TurnStart(len(self.tokens), self.cache.seen, copy.deepcopy(self.states), kept))
        if self.evicts and len(self._starts) > 1:
            self._starts[-2].cache = None  # one copy at a time: an evicting stack is there to save memory
        self.turns.append(TurnStats(len(self.turns), prompt_tokens=len(new_tokens), reused_tokens=len(self.tokens)))
        self.tokens.extend(new_tokens)
        self.turn_start = self.cache.seen
        self.output_index = 0

    def undo(self) -> None:
        """Take back the last turn (complete or broken off): tokens, pairs, states and figures are as before it."""
        self.require_rest()
        if not self._starts:
            raise CacheError("nothing to undo: the conversation has no turn yet")
        start = self._starts[-1]
        if self.evicts:
            if start.cache is None:
                raise CacheError("an evicting stack can take back one turn only: the pairs of earlier turns are gone")
            self.cache = start.cache
        else:
            self.cache.truncate(start.cached)
        self._starts.pop()
        self.turns.pop()
        self.states = start.states
        del self.tokens[start.tokens :]
        self.turn_start = self._starts[-1].cached if self._starts else 0
        self.output_index = 0

    def fork(self) -> Session:
        """An independent copy, to try two answers. Policies are shared (they never change), nothing else is."""
        self.require_rest()
        other = Session(self.policies)
        other.cache = self.cache.fork()
        other.tokens = list(self.tokens)
        other.states = copy.deepcopy(self.states)
        other.turns = copy.deepcopy(self.turns)
        other.output_index, other.turn_start = self.output_index, self.turn_start
        other._starts = [
            _TurnStart(s.tokens, s.cached, copy.deepcopy(s.states), s.cache.fork() if s.cache else None)
            for s in self._starts
        ]
        return other

    def enter(self, phase: Phase) -> None:
        self.stats.phase = phase
