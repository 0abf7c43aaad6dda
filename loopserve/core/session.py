"""One conversation as tokens: its cache, its policies' states, its turns. Knows no text and runs no model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loopserve.core.cache import ActiveSet, KVCache
from loopserve.core.errors import CacheError, Fault, InputError, PolicyError
from loopserve.core.faults import FAULTS, Owners, Policy, blamed
from loopserve.core.guard import Guard
from loopserve.core.hidden import holds, storages
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
    retention: Retention = Retention.KEEP  # what the compressor declares, asked once
    most_pairs: int | None = None
    unwatched_pairs: int = 0


def assign(layers: Sequence[LayerSpec], stack: PolicyStack) -> tuple[LayerPolicies, ...]:
    """The stack's policies layer by layer; only full-attention layers get any."""
    total, owners = len(layers), stack.owners
    assigned = []
    for layer in layers:
        if layer.type is not LayerType.FULL:
            assigned.append(LayerPolicies(layer, None, None, watches_before=False, watches_after=False))
            continue
        compressor = stack.decode_for(layer.index, total)
        retention, most, unwatched = _declared(compressor, owners)
        assigned.append(
            LayerPolicies(
                layer,
                stack.prefill_for(layer.index, total),
                compressor,
                watches_before=type(compressor).before_attention is not DecodeCompressor.before_attention,
                watches_after=type(compressor).after_attention is not DecodeCompressor.after_attention,
                retention=retention,
                most_pairs=most,
                unwatched_pairs=unwatched,
            )
        )
    return tuple(assigned)


def _declared(compressor: DecodeCompressor[Any], owners: Owners) -> tuple[Retention, int | None, int]:
    with blamed(compressor, "its declaration", owners):
        return Retention(compressor.retention), compressor.most_pairs, int(compressor.unwatched_pairs)


@dataclass
class _TurnStart:
    """What a turn began with, so that it can be taken back."""

    tokens: int
    cached: int
    ended: bool
    states: dict[int, Any]
    aside: frozenset[int]
    active: list[ActiveSet | None]  # by layer, where the turn before it waits for its answer
    cache: KVCache | None  # a copy, only where the stack evicts: an eviction cannot be undone otherwise


class Session:
    """Tokens, cache, policy states and turns of one conversation. Two sessions share nothing that changes."""

    def __init__(self, policies: tuple[LayerPolicies, ...], guard: Guard | None = None) -> None:
        """guard: the engine's; by default one that raises every fault."""
        self.policies = policies
        self.guard = guard or Guard()
        self.cache = KVCache(len(policies))
        self.tokens: list[int] = []
        self.turns: list[TurnStats] = []
        self.output_index = 0
        self.turn_start = 0
        self.ended = True  # compressors have been told that the last turn is over
        self.answering = False  # an answer is being written: no other turn may begin, end or be copied
        self.aside: set[int] = set()  # policies (by id) that this turn is served without, after a fault
        self.damaged = False  # the stored pairs were written to by somebody else
        self._starts: list[_TurnStart] = []
        self._ruled: dict[int, list[LayerSpec]] = {}
        self.compressors: dict[int, DecodeCompressor[Any]] = {}
        for policy in policies:
            if policy.compressor is not None:
                self.compressors[id(policy.compressor)] = policy.compressor
                self._ruled.setdefault(id(policy.compressor), []).append(policy.spec)
        self._actors: dict[int, Policy] = dict(self.compressors)
        self._actors |= {id(each.sparsifier): each.sparsifier for each in policies if each.sparsifier is not None}
        self.states: dict[int, Any] = {}  # begun with the first turn
        self.evicts = any(each.retention is Retention.EVICT for each in policies)

    @property
    def stats(self) -> TurnStats:
        """Figures of the turn under way, or of the last one."""
        return self.turns[-1]

    def ruled_by(self, key: int) -> tuple[LayerSpec, ...]:
        """The layers of one compressor."""
        return tuple(self._ruled[key])

    def require_rest(self) -> None:
        """InputError while an answer is being written."""
        if self.answering:
            raise InputError("an answer is still being written: read it to its end, or close its stream, first")

    def begin_turn(self, new_tokens: Sequence[int], *, undoable: bool = True) -> None:
        """Take in the tokens a turn adds; they are not computed yet.

        undoable: keep copies of the states and, under an evicting stack, of the survivors, so that the turn can be taken back.
        """
        self.require_rest()
        stats = TurnStats(len(self.turns), prompt_tokens=len(new_tokens), reused_tokens=len(self.tokens))
        states, copies, aside = self._begun(stats, undoable)  # before anything else is changed: it may raise
        active = [layer.active if undoable and not self.ended else None for layer in self.cache.layers]
        self.cache.release()
        kept = self.cache.fork() if self.evicts and undoable else None
        self._starts.append(
            _TurnStart(len(self.tokens), self.cache.seen, self.ended, copies, frozenset(self.aside), active, kept)
        )
        self.states, self.aside, self.ended = states, aside, False
        self.turns.append(stats)
        self.tokens.extend(new_tokens)
        self.turn_start = self.cache.seen
        self.output_index = 0

    def end_turn(self) -> None:
        """The turn is complete. Until now the one before could be taken back as well, if this one broke off."""
        for key, compressor in self.compressors.items():
            if self.trusts(compressor):
                try:
                    self.guard.ask(compressor, compressor.end_turn, self.states[key])
                except FAULTS as error:
                    self.failed(compressor, error, "end_turn")
        self.ended = True
        for start in self._starts[:-1]:
            start.cache, start.active = None, [None] * len(start.active)  # one copy at rest, to save memory

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
        for layer, active in zip(self.cache.layers, start.active, strict=True):
            layer.active = active
        self._starts.pop()
        self.turns.pop()
        self.states, self.aside, self.ended = start.states, set(start.aside), start.ended
        if self.damaged:  # the next turn computes the conversation anew
            self.cache.clear()
            self.states, self.damaged = {}, False
        del self.tokens[start.tokens :]
        self.turn_start = self._starts[-1].cached if self._starts else 0
        self.output_index = 0

    def fork(self) -> Session:
        """An independent copy, to try two answers. Policies are shared (they never change), nothing else is."""
        self.require_rest()
        other = Session(self.policies, self.guard)
        other.states, other.aside = self._copied(self.states), set(self.aside)
        other.cache = self.cache.fork()
        other.tokens = list(self.tokens)
        other.turns = copy.deepcopy(self.turns)
        other.output_index, other.turn_start, other.ended = self.output_index, self.turn_start, self.ended
        other._starts = [
            replace(
                s,
                states=self._copied(s.states),
                active=[each.copy() if each else None for each in s.active],
                cache=s.cache.fork() if s.cache else None,
            )
            for s in self._starts
        ]
        return other

    def enter(self, phase: Phase) -> None:
        self.stats.phase = phase

    # Policies that break their contract.

    def trusts(self, policy: Policy | None) -> bool:
        """Whether a policy takes part in this turn."""
        return id(policy) not in self.aside

    def failed(self, policy: Policy, error: BaseException, moment: str, layer: int | None = None) -> None:
        """A policy's call went wrong: PolicyFault, or the rest of this turn without it, its layers dense.

        A fault that damaged the store is raised in any case: only the engine can repair it.
        """
        fault = self.guard.note(policy, error, moment=moment, layer=layer, phase=self.stats.phase)
        self.damaged |= fault.damaged
        if self.guard.raises:
            raise fault from error
        self.stats.count(f"fault:{fault.fault}")
        self.aside.add(id(policy))
        for each in self._ruled.get(id(policy), ()):
            self.cache.layers[each.index].release()
        if fault.damaged:
            raise fault from error

    def look_for_references(self) -> None:
        """After a pass, find the policy whose state still holds a part of the store (strict checks)."""
        stores = [layer.store for layer in self.cache.layers if layer.store is not None]
        places = storages([part for store in stores for part in (store.keys, store.values)])
        for key, policy in self._actors.items():
            if self.trusts(policy) and holds(self.states[key], places):
                kept = PolicyError("its state keeps a reference to the session's store after the pass", Fault.KEPT)
                self.failed(policy, kept, "its state")

    def renew(self) -> None:
        """Forget every stored pair; the rest of this turn is served without any policy, and all begin anew with the next."""
        self.cache.clear()
        self.aside = set(self._actors)
        self.damaged = False

    def _begun(self, stats: TurnStats, undoable: bool) -> tuple[dict[int, Any], dict[int, Any], set[int]]:
        """The states that a turn begins with, copies of them to go back to, and the policies it is served without.

        A policy that has no state yet, or was put aside in the last turn and missed a part of it, gets a fresh one. Of a policy that
        this turn is served without, what it has stays as it is, to go back to.
        """
        states: dict[int, Any] = {}
        copies: dict[int, Any] = {}
        aside: set[int] = set()
        for key, policy in self._actors.items():
            if self.guard.skips(policy):
                stats.count("breaker_open")
                aside.add(key)
                continue
            moment = "init_state"
            try:
                kept = key in self.states and key not in self.aside
                states[key] = self.states[key] if kept else self._fresh(policy)
                moment = "a copy of its state"
                if undoable:
                    copies[key] = copy.deepcopy(states[key])
                if kept and not self.ended and isinstance(policy, DecodeCompressor):
                    moment = "end_turn"  # the last turn got no answer, or nobody said that it was complete
                    self.guard.ask(policy, policy.end_turn, states[key])
            except FAULTS as error:
                fault = self.guard.note(policy, error, moment=moment)
                if self.guard.raises:
                    self.states |= {each: before for each, before in copies.items() if each in self.states}
                    raise fault from error
                stats.count(f"fault:{fault.fault}")
                aside.add(key)
        for key in aside:
            states[key] = {}
            if key in self.states:
                copies.setdefault(key, self.states[key])
        return states, copies, aside

    def _fresh(self, policy: Policy) -> Any:
        return {} if isinstance(policy, PrefillSparsifier) else self.guard.ask(policy, policy.init_state)

    def _copied(self, states: dict[int, Any]) -> dict[int, Any]:
        """Copies that share nothing. A state that cannot be copied is left out, so that its policy begins anew."""
        copies = {}
        for key, state in states.items():
            try:
                copies[key] = copy.deepcopy(state)
            except FAULTS as error:
                fault = self.guard.note(self._actors[key], error, moment="a copy of its state")
                if self.guard.raises:
                    raise fault from error
        return copies
