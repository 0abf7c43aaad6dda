"""Call a layer's policies for one session: what they are shown, when, and what becomes of their faults."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopserve.core.engine.forward import ForwardContext, LayerCall
from loopserve.core.engine.session import Session
from loopserve.core.engine.slots import LayerPolicies
from loopserve.core.engine.stats import LayerRecord
from loopserve.core.errors import Fault, ModelError
from loopserve.core.guard.faults import FAULTS
from loopserve.core.policy.deferred import DeferredInputs, Gathered
from loopserve.core.policy.interfaces import AttentionInputs, Phase


def shows(context: ForwardContext, policies: LayerPolicies) -> bool:
    """Decide whether a layer's compressor is called in this pass; note the slot if it is."""
    slot = policies.decode_slot
    stored = context.session.cache.layers[policies.spec.index].stored
    if not (policies.shows(stored) and context.session.is_enabled(slot) and context.observer in (None, slot)):
        return False
    context.shown.add(slot)
    return True


def keep_apart(context: ForwardContext, error: Exception) -> None:
    """Keep an error of an isolated session in its context, so that it takes no further part in the pass; raise that of any other."""
    if not context.isolated:
        raise error
    context.error = error


def inputs_of(context: ForwardContext, call: LayerCall, policies: LayerPolicies, queries: Tensor) -> AttentionInputs:
    """Return what the policies of a layer are shown of a session's queries ``[Hq, T, D]``."""
    session, index = context.session, policies.spec.index
    cache, stats = session.cache.layers[index], session.stats
    assert cache.store is not None
    total = cache.stored
    if context.phase is Phase.OBSERVE:
        columns = _columns_of(context.positions, cache.positions())
    else:
        columns = cache.counted(total - queries.shape[1], total, queries.device)
    kind: type[AttentionInputs] = AttentionInputs
    pairs: dict[str, Any]
    if cache.store.in_place:
        pairs = {"keys": cache.store.keys, "values": cache.store.values}
    else:
        context.gathered = context.gathered or Gathered(cache.store)
        kind, pairs = DeferredInputs, {"keys": None, "values": None, "gathered": context.gathered}
    return kind(
        **pairs,
        queries=queries,
        columns=columns,
        positions=cache.positions(),
        first_valid=cache.first_valid,
        layer=policies.spec,
        phase=context.phase,
        turn=stats.turn,
        turn_start=session.turn_start,
        output_index=session.output_index,
        final=context.final,
        scaling=call.scaling,
        softcap=call.softcap,
        record=LayerRecord(stats, index),
        selection=cache.active.selection if cache.active is not None else None,
        scratch=context.scratch.setdefault(index, {}),
        state=session.states[policies.prefill_slot],
        compressor_layers=session.slots.layers_of(policies.decode_slot),
        strict=session.guard.strict,
    )


def _columns_of(positions: Tensor, stored: Tensor) -> Tensor:
    """Columns of positions of this turn, which every head holds at the same places."""
    row = stored if stored.dim() == 1 else stored[0]
    return torch.searchsorted(row, positions)


def observe(context: ForwardContext, policies: LayerPolicies, inputs: AttentionInputs) -> None:
    """Let the compressor observe."""
    session, compressor = context.session, policies.compressor
    if not policies.observes_after or not session.is_enabled(policies.decode_slot):
        return
    assert compressor is not None
    try:
        session.guard.ask(compressor, compressor.after_attention, inputs, session.states[policies.decode_slot])
    except FAULTS as error:
        failed(session, policies.decode_slot, error, "after_attention", inputs)


def failed(session: Session, slot: str, error: BaseException, moment: str, inputs: AttentionInputs) -> None:
    """Deal with a policy's fault, unless what it was given were no numbers."""
    if getattr(error, "fault", None) is not Fault.WROTE and not bool(inputs.queries.isfinite().all()):
        raise ModelError(
            f"the model's queries of layer {inputs.layer.index} are not finite numbers: its weights are damaged or its dtype "
            "overflows; load it in another dtype"
        ) from error
    session.failed(slot, error, moment, inputs.layer.index)
