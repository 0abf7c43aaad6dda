"""Keep one conversation as tokens: its cache, the states of its policies, its turns. Knows no text and runs no model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch

from loopserve.core.engine.attention_map import AttentionMap
from loopserve.core.engine.policy_states import (
    RECURRENT,
    begin_states,
    copy_states,
    fresh_state,
    pack_states,
    unpack_recurrent,
    unpack_states,
)
from loopserve.core.engine.slots import Slots
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import CacheError, Fault, InputError, ModelError, PolicyError
from loopserve.core.guard.faults import FAULTS
from loopserve.core.guard.guard import Guard
from loopserve.core.guard.strict_checks import holds, storages
from loopserve.core.kv.cache import KVCache, RecurrentStates, bytes_of_states, copied_states
from loopserve.core.kv.layer_cache import ActiveSet
from loopserve.core.kv.recording import plain_tensors
from loopserve.core.policy.interfaces import Phase
from loopserve.core.policy.state import PackedState

UNDO_DEPTH = 8
_TIMES = count()  # sessions are ordered by when they were last used


@dataclass
class TurnStart:
    """Hold what a turn began with, so that it can be taken back."""

    tokens: int
    cached: int
    ended: bool
    states: dict[str, Any] | None  # None: dropped, the turn lies deeper than the session's undo depth
    disabled: frozenset[str]
    active: list[ActiveSet | None]  # by layer, where the turn before it waits for its answer
    cache: KVCache | None = None  # a copy, only where the stack evicts: an eviction cannot be undone otherwise
    recurrent: RecurrentStates | None = None  # copies of the layers' own states; None: none, dropped, or in ``cache``


@dataclass(eq=False, repr=False)
class Session:
    """Hold the tokens, cache, policy states and turns of one conversation. Two sessions share nothing that changes.

    undo_depth: turns whose policy states are kept to go back to. Taking back more drops the cache: the next turn computes the
    conversation anew from its tokens.
    """

    slots: Slots
    guard: Guard = field(default_factory=Guard)
    undo_depth: int = UNDO_DEPTH
    tokens: list[int] = field(default_factory=list)
    turns: list[TurnStats] = field(default_factory=list)
    states: dict[str, Any] = field(default_factory=dict)  # by slot, made with the first turn
    disabled: set[str] = field(default_factory=set)  # slots that this turn is served without, after a fault
    output_index: int = 0
    turn_start: int = 0
    position_offset: int = (
        0  # what the model's positions are ahead of ours: a caller's left padding, counted by columns
    )
    rotation: int = 0  # how the stored pairs are rotated: what ``Model.rotation`` said when they were computed
    ended: bool = True  # the compressors know that the last turn is over
    busy: bool = False  # a turn is under way: no other may begin, end or be copied
    damaged: bool = False  # stored pairs were written to by somebody else
    repeatable: bool = True  # False: its tokens alone do not say what was computed (images)
    closed: bool = False
    state_bytes: int = 0  # what the policies report of their states
    attention_map: AttentionMap | None = None  # counts what decode steps attend to, where somebody asked for it

    def __post_init__(self) -> None:
        self.cache = self.slots.empty_cache()
        self._starts: list[TurnStart] = []
        self.used_at = next(_TIMES)
        self.slots.sessions.add(self)

    def __repr__(self) -> str:
        return f"<Session of {len(self.turns)} turns, {len(self.tokens)} tokens>"

    @property
    def stats(self) -> TurnStats:
        """Figures of the turn under way, or of the last one. InputError before the first turn."""
        if not self.turns:
            raise InputError("the conversation has no turn yet")
        return self.turns[-1]

    @property
    def allocated_bytes(self) -> int:
        """Bytes taken from the machine: cache, copies kept for undo, and what the policies report of their states."""
        copies = sum(start.cache.allocated_bytes for start in self._starts if start.cache is not None)
        return self.cache.allocated_bytes + copies + self.copied_state_bytes + self.state_bytes

    @property
    def copied_state_bytes(self) -> int:
        """Bytes of the recurrent states that turns began with, kept for undo."""
        return sum(bytes_of_states(start.recurrent) for start in self._starts if start.recurrent)

    def require_rest(self) -> None:
        """Raise InputError while a turn is under way, or once the session is closed."""
        if self.closed:
            raise InputError("the session is closed: open a new one")
        if self.busy:
            raise InputError("an answer is still being written: read it to its end, or close its stream, first")

    def close(self) -> None:
        """Free the cache and the states at once. The tokens and figures stay readable."""
        self.closed = True
        self._drop_store()
        self._starts = []

    def release_store(self) -> None:
        """Free the cache and the policy states; the next turn computes the conversation anew from its tokens.

        Raises InputError while a turn is under way.
        """
        self.require_rest()
        self._drop_store()

    def _drop_store(self) -> None:
        self.cache.clear()
        self.states, self.damaged = {}, False
        self.turn_start = self.state_bytes = 0
        for start in self._starts:
            start.states, start.cached, start.cache, start.recurrent = None, 0, None, None
            start.active = [None] * len(start.active)

    @plain_tensors()
    def begin_anew(self) -> None:
        """Drop what is stored and the policies' states in the midst of a turn, whose tokens are then computed again."""
        self._drop_store()
        self.output_index = 0
        for slot in self.slots.policies:
            self.states[slot] = {}
            if self.is_enabled(slot):
                try:
                    self.states[slot] = fresh_state(self.slots, self.guard, slot)
                except FAULTS as error:
                    self.failed(slot, error, "init_state")

    @plain_tensors()
    def begin_turn(self, new_tokens: Sequence[int], *, undoable: bool = True) -> None:
        """Take in the tokens that a turn adds; they are not computed yet.

        undoable: keep copies of the states and, under an evicting stack, of the survivors, so that the turn can be taken back.
        """
        self.require_rest()
        self.used_at = next(_TIMES)
        reused = len(self.tokens) if self.cache.seen else 0  # nothing is, where a deep undo dropped the cache
        stats = TurnStats(len(self.turns), prompt_tokens=len(new_tokens), reused_tokens=reused)
        states, copies, disabled = begin_states(  # first: it may raise
            self.slots, self.guard, self.states, self.disabled, stats, ended=self.ended, undoable=undoable
        )
        active = [layer.active if undoable and not self.ended else None for layer in self.cache.layers]
        self.cache.release()
        kept = self.cache.fork() if self.slots.evicts and undoable else None
        recurrent = copied_states(self.cache.recurrent) if self.slots.recurrent and undoable and kept is None else None
        held = len(self.tokens), self.cache.seen, self.ended
        self._starts.append(TurnStart(*held, copies, frozenset(self.disabled), active, kept, recurrent))
        self._limit_undo()
        self.states, self.disabled, self.ended = states, disabled, False
        self.turns.append(stats)
        self.tokens.extend(new_tokens)
        self.turn_start = self.cache.seen
        self.output_index = 0

    @plain_tensors()
    def end_turn(self) -> None:
        """Tell the compressors that the turn is complete. Until now the turn before could be taken back as well."""
        for slot, compressor in self.slots.compressors.items():
            if self.is_enabled(slot):
                try:
                    self.guard.ask(compressor, compressor.end_turn, self.states[slot])
                except FAULTS as error:
                    self.failed(slot, error, "end_turn")
        self.ended = True
        for start in self._starts[:-1]:
            start.cache, start.active = None, [None] * len(start.active)  # one copy at rest, to save memory

    @plain_tensors()
    def undo(self) -> None:
        """Take back the last turn, complete or not: tokens, pairs, states and figures are as before it.

        Where the state before it is no longer kept, the cache is dropped and the next turn computes the conversation anew.
        """
        self.require_rest()
        if not self._starts:
            raise CacheError("nothing to undo: the conversation has no turn yet")
        start = self._starts.pop()
        self.turns.pop()
        del self.tokens[start.tokens :]
        self.output_index = 0
        self.turn_start = self._starts[-1].cached if self._starts else 0
        self.ended, self.disabled = start.ended, set(start.disabled)
        lost = start.cache is None and (self.slots.evicts or (self.slots.recurrent and start.recurrent is None))
        if start.states is None or self.damaged or lost:
            self.disabled = set()
            self._drop_store()
            return
        self.states = start.states
        if start.cache is not None:
            self.cache = start.cache
        else:
            self.cache.truncate(start.cached)
            self.cache.recurrent = start.recurrent or {}
            if self.slots.recurrent and self.cache.seen != start.cached:  # cancelled while it was computed anew
                self._drop_store()
                return
        for layer, active in zip(self.cache.layers, start.active, strict=True):
            layer.active = active

    @plain_tensors()
    def go_back(self, length: int) -> None:
        """Keep the first ``length`` tokens. Whole turns are taken back as by ``undo``; beyond that, pairs are cut off.

        A policy whose state at that place is no longer known begins anew. Where pairs were evicted, the cache is dropped.
        """
        self.require_rest()
        while len(self.tokens) > length and self._starts and self._starts[-1].tokens >= length:
            if self._starts[-1].states is None:
                break
            self.undo()
        if len(self.tokens) <= length:
            return
        if self.slots.evicts or not self.cache.intact:
            self._drop_store()
        else:
            self.cache.truncate(min(length, self.cache.seen))
        self.states, self.disabled, self._starts = {}, set(), []
        self.ended, self.output_index = True, 0
        del self.tokens[length:]

    @plain_tensors()
    def fork(self) -> Session:
        """Return an independent copy, to try two answers. Policies are shared (they never change), nothing else is."""
        self.require_rest()
        other = replace(
            self,
            tokens=list(self.tokens),
            turns=copy.deepcopy(self.turns),
            states=copy_states(self.slots, self.guard, self.states),
            disabled=set(self.disabled),
            attention_map=None,
        )
        other.cache = self.cache.fork()
        other._starts = [
            replace(
                start,
                states=None if start.states is None else copy_states(self.slots, self.guard, start.states),
                active=[each.copy() if each else None for each in start.active],
                cache=start.cache.fork() if start.cache else None,
                recurrent=None if start.recurrent is None else copied_states(start.recurrent),
            )
            for start in self._starts
        ]
        if not self.cache.intact:  # a copy of pairs that somebody wrote into would look whole
            other._drop_store()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self.fork()

    # States on disk.

    def pack_states(self) -> tuple[dict[str, PackedState], dict[str, str]]:
        """Return each policy's state by slot as a JSON-able tree and tensors, and by slot why a state cannot be written.

        A slot in neither begins anew with the next turn, as does one that cannot be written. The states of recurrent layers are
        there under ``policy_states.RECURRENT``. Raises InputError while a turn is under way.
        """
        self.require_rest()
        enabled = {slot: state for slot, state in self.states.items() if self.is_enabled(slot)}
        return pack_states(self.slots, self.guard, enabled, self.cache.recurrent)

    def restore_states(self, packed: Mapping[str, PackedState], device: torch.device | None = None) -> dict[str, str]:
        """Take over states that ``pack_states`` wrote, their tensors on ``device``. Return by slot why a state cannot be read.

        The policy of such a slot, and of one that ``packed`` does not name, begins anew with the next turn. The cache must hold the
        tokens that it held when the states were written; it is dropped where the states of recurrent layers cannot be read. Raises
        InputError while a turn is under way.
        """
        self.require_rest()
        self.states, self.disabled = {}, set()
        if self.slots.recurrent and self.cache.seen:
            try:
                self.cache.recurrent = unpack_recurrent(self.slots, packed.get(RECURRENT), device)
            except PolicyError as error:
                self._drop_store()
                return {RECURRENT: str(error)}
        self.states, problems = unpack_states(self.slots, self.guard, packed, device)
        return problems

    # Policies that break their contract.

    def is_enabled(self, slot: str) -> bool:
        """Return whether the policy of a slot takes part in this turn."""
        return slot not in self.disabled

    def failed(self, slot: str, error: BaseException, moment: str, layer: int | None = None) -> None:
        """Deal with a policy's fault: raise PolicyFault, or serve the rest of this turn without the policy, its layers dense.

        A fault that damaged the store is raised in any case: only the engine can repair it.
        """
        if getattr(error, "fault", None) is not Fault.WROTE:
            self._require_numbers(error)
        policy = self.slots.policies[slot]
        fault = self.guard.note(policy, error, moment=moment, layer=layer, phase=self.stats.phase)
        self.damaged |= fault.damaged
        if self.guard.raises:
            raise fault from error
        self.stats.count(f"fault:{fault.fault}")
        self.disabled.add(slot)
        for each in self.slots.layers_of(slot):
            self.cache.layers[each.index].release()
        if fault.damaged:
            raise fault from error

    def _require_numbers(self, error: BaseException) -> None:
        """Raise ModelError if the model gave keys or values that are no numbers: what a policy makes of them is not its fault."""
        for index, layer in enumerate(self.cache.layers):
            if layer.store is None or not layer.stored:  # another engine's layer may not have been called yet
                continue
            if not all(bool(part.isfinite().all()) for part in (layer.store.keys, layer.store.values)):
                raise ModelError(
                    f"the model's keys or values of layer {index} are not finite numbers: its weights are damaged or its dtype "
                    "overflows; load it in another dtype"
                ) from error

    def look_for_references(self) -> None:
        """After a pass, find the policy whose state still holds a part of the store. Done under strict checks only."""
        if not self.guard.strict:
            return
        stores = [layer.store for layer in self.cache.layers if layer.store is not None]
        places = storages([part for store in stores for part in (store.keys, store.values)])
        for slot in self.slots.policies:
            if self.is_enabled(slot) and holds(self.states[slot], places):
                kept = PolicyError("its state keeps a reference to the session's store after the pass", Fault.KEPT)
                self.failed(slot, kept, "its state")

    def serve_dense(self) -> None:
        """Drop every stored pair and serve the rest of this turn without any policy; all begin anew with the next turn."""
        self.cache.clear()
        self.disabled = set(self.slots.policies)
        self.damaged = False

    def enter(self, phase: Phase) -> None:
        """Say which phase the figures that follow belong to."""
        self.stats.phase = phase

    def _limit_undo(self) -> None:
        for start in self._starts[: -self.undo_depth]:
            start.states = start.recurrent = None
