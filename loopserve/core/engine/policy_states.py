"""Begin, copy, write and read the states that the policies of a session keep, one per slot.

A policy that fails here is named. Its slot is then served without it, or begins anew. Knows no cache and runs no model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from loopserve.core.engine.slots import Slots
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import PolicyError
from loopserve.core.guard.faults import FAULTS
from loopserve.core.guard.guard import Guard
from loopserve.core.kv.cache import RecurrentStates
from loopserve.core.policy.interfaces import DecodeCompressor
from loopserve.core.policy.state import PackedState, pack_state, unpack_state

RECURRENT = "recurrent"  # in place of a slot: the states of the model's recurrent layers, where states are written


def fresh_state(slots: Slots, guard: Guard, slot: str) -> Any:
    """Return the state that the policy of a slot begins with."""
    policy = slots.policies[slot]
    return guard.ask(policy, policy.init_state)


def begin_states(
    slots: Slots,
    guard: Guard,
    held: dict[str, Any],
    missed: set[str],
    stats: TurnStats,
    *,
    ended: bool,
    undoable: bool,
) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Return the states that a turn begins with, copies to go back to, and the slots that it is served without.

    held: the states after the last turn. missed: slots that were disabled in it. ended: the compressors know that it is over.
    undoable: make copies.

    A policy that has no state yet, or was disabled in the last turn and missed a part of it, gets a fresh one. The state of a
    policy that this turn is served without is kept as it is, to go back to. Where a fault is raised, ``held`` gets the copies
    back.
    """
    states: dict[str, Any] = {}
    copies: dict[str, Any] = {}
    disabled: set[str] = set()
    for slot, policy in slots.policies.items():
        if guard.skips(policy):
            stats.count("breaker_open")
            disabled.add(slot)
            continue
        moment = "init_state"
        try:
            kept = slot in held and slot not in missed
            states[slot] = held[slot] if kept else fresh_state(slots, guard, slot)
            moment = "a copy of its state"
            if undoable:
                copies[slot] = copy.deepcopy(states[slot])
            if kept and not ended and isinstance(policy, DecodeCompressor):
                moment = "end_turn"  # the last turn got no answer, or nobody said that it was complete
                guard.ask(policy, policy.end_turn, states[slot])
        except FAULTS as error:
            fault = guard.note(policy, error, moment=moment)
            if guard.raises:
                held.update({each: before for each, before in copies.items() if each in held})
                raise fault from error
            stats.count(f"fault:{fault.fault}")
            disabled.add(slot)
    for slot in disabled:
        states[slot] = {}
        if slot in held:
            copies.setdefault(slot, held[slot])
    return states, copies, disabled


def copy_states(slots: Slots, guard: Guard, states: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies that share nothing. A state that cannot be copied is left out, so that its policy begins anew."""
    copies = {}
    for slot, state in states.items():
        try:
            copies[slot] = copy.deepcopy(state)
        except FAULTS as error:
            fault = guard.note(slots.policies[slot], error, moment="a copy of its state")
            if guard.raises:
                raise fault from error
    return copies


def pack_states(
    slots: Slots, guard: Guard, states: Mapping[str, Any], recurrent: RecurrentStates
) -> tuple[dict[str, PackedState], dict[str, str]]:
    """Return states by slot as JSON-able trees and tensors, and by slot why a state cannot be written.

    recurrent: the states of recurrent layers, which are there under ``RECURRENT`` if there are any.
    """
    packed: dict[str, PackedState] = {}
    problems: dict[str, str] = {}
    for slot, policy in slots.policies.items():
        if slot not in states:
            continue
        try:
            packed[slot] = guard.ask(policy, policy.pack_state, states[slot])
        except FAULTS as error:
            problems[slot] = _named(slots, slot, error)
    if recurrent:
        packed[RECURRENT] = pack_state(recurrent, {})
    return packed, problems


def unpack_states(
    slots: Slots, guard: Guard, packed: Mapping[str, PackedState], device: torch.device | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the policies' states that ``pack_states`` wrote, on ``device``, and by slot why a state cannot be read."""
    states: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for slot, each in packed.items():
        if slot == RECURRENT:
            continue
        policy = slots.policies.get(slot)
        try:
            if policy is None:
                raise PolicyError(f"this session has no slot {slot!r}; it has {', '.join(slots.policies)}")
            states[slot] = guard.ask(policy, policy.unpack_state, each, device)
        except FAULTS as error:
            problems[slot] = _named(slots, slot, error)
    return states, problems


def unpack_recurrent(slots: Slots, packed: PackedState | None, device: torch.device | None) -> RecurrentStates:
    """Return the states of recurrent layers that ``pack_states`` wrote. PolicyError unless every such layer has them."""
    if packed is None:
        raise PolicyError("the states of the model's recurrent layers are not there: the conversation is computed anew")
    states: RecurrentStates = unpack_state(*packed, {}, device)
    wanted = {each.spec.index for each in slots.by_layer if each.spec.recurrent}
    fits = isinstance(states, dict) and set(states) == wanted
    if not fits or not all(isinstance(part, dict) for part in states.values()):
        raise PolicyError("the states of recurrent layers are damaged, or of another model: it is computed anew")
    if not all(isinstance(each, torch.Tensor) for part in states.values() for each in part.values()):
        raise PolicyError("the states of recurrent layers are damaged: the conversation is computed anew")
    return states


def _named(slots: Slots, slot: str, error: BaseException) -> str:
    policy = slots.policies.get(slot)
    said = str(error) if isinstance(error, PolicyError) else f"it raised {type(error).__name__}: {error}"
    return said if policy is None else f"{slot} ({policy.name}): {said}"
