"""Compute one layer's attention for every session of a forward pass: the only caller of a policy's per-layer methods.

The bridge hands over rotated queries of sessions whose new pairs are stored; what comes back is the layer's attention output.
Knows no model family.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopserve.core.engine.forward import ForwardContext
from loopserve.core.engine.session import Session
from loopserve.core.engine.slots import LayerPolicies
from loopserve.core.engine.stats import LayerRecord
from loopserve.core.errors import Fault, ModelError
from loopserve.core.guard.faults import FAULTS
from loopserve.core.guard.guard import check_output, check_pattern, check_selection
from loopserve.core.kv.layer_cache import LayerCache
from loopserve.core.policy.deferred import DeferredInputs, Gathered
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.layers import LayerType
from loopserve.core.policy.patterns import AttentionPattern, DensePattern
from loopserve.kernels.decode_attention import DecodeRequest, decode_attention_batch
from loopserve.kernels.dense_attention import dense_attention


@dataclass(frozen=True)
class LayerCall:
    """Hold what one layer of the model asks for, equal for all sessions of a pass.

    window: sliding window in tokens, own token included. sinks ``[Hq]``: logits of a virtual key without value that only takes
    mass (gpt-oss).
    """

    layer: int
    scaling: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


def attend(contexts: Sequence[ForwardContext], call: LayerCall, queries: Sequence[Tensor]) -> list[Tensor]:
    """Return one layer's attention output ``[Hq, T, D]`` per session, for its rotated queries ``[Hq, T, D]``.

    The decode steps of all sessions go through one kernel call. An error of one session among several is kept in its context,
    and its output is zero from there on.
    """
    return [
        torch.zeros_like(rows) if output is None else output
        for rows, output in zip(queries, attend_sparse(contexts, call, queries), strict=True)
    ]


def attend_sparse(
    contexts: Sequence[ForwardContext], call: LayerCall, queries: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the same; None for a session in error, and for one that is hosted and attends to every pair in this call."""
    outputs: list[Tensor | None] = [None] * len(contexts)
    steps: list[tuple[int, _DecodeStep]] = []
    for index, (context, rows) in enumerate(zip(contexts, queries, strict=True)):
        if context.error is not None:
            continue
        try:
            policies = context.session.slots.by_layer[call.layer]
            plain = policies.spec.type is not LayerType.FULL or call.window is not None
            shown = not plain and _shows(context, policies)
            if plain:
                outputs[index] = _with_sinks(call, *_as_the_model_defines(context, call, rows))
            elif context.phase is Phase.DECODE:
                steps.append((index, _select(context, call, policies, rows, shown)))
            elif (found := _many_rows(context, call, policies, rows, shown)) is not None:
                outputs[index] = _with_sinks(call, *found)
        except Exception as error:
            _keep_apart(context, error)
    requests = {index: step.request for index, step in steps if step.request is not None}
    attended = decode_attention_batch(
        list(requests.values()),
        scaling=call.scaling,
        softcap=call.softcap,
        need_lse=call.sinks is not None,
    )
    for index, (output, lse) in zip(requests, attended, strict=True):
        outputs[index] = _with_sinks(call, output, lse)
    for index, step in steps:
        if step.observes:
            try:
                _observe_step(contexts[index], call, step)
            except Exception as error:
                _keep_apart(contexts[index], error)
    for context in contexts:
        if context.gathered is not None:
            context.gathered.release()
            context.gathered = None
    return [None if context.error is not None else output for context, output in zip(contexts, outputs, strict=True)]


def _shows(context: ForwardContext, policies: LayerPolicies) -> bool:
    """Decide whether a layer's compressor is called in this pass; note the slot if it is."""
    slot = policies.decode_slot
    stored = context.session.cache.layers[policies.spec.index].stored
    if not (policies.shows(stored) and context.session.is_enabled(slot) and context.observer in (None, slot)):
        return False
    context.shown.add(slot)
    return True


def _keep_apart(context: ForwardContext, error: Exception) -> None:
    """Keep an error of an isolated session in its context, so that it takes no further part in the pass; raise that of any other."""
    if not context.isolated:
        raise error
    context.error = error


def _with_sinks(call: LayerCall, output: Tensor, lse: Tensor | None) -> Tensor:
    """Take the mass of the virtual keys out of an output ``[Hq, T, D]``."""
    if call.sinks is None:
        return output
    assert lse is not None
    return output * torch.sigmoid(lse - call.sinks.float()[:, None])[..., None].to(output.dtype)


def _inputs(context: ForwardContext, call: LayerCall, policies: LayerPolicies, queries: Tensor) -> AttentionInputs:
    session, index = context.session, policies.spec.index
    cache = session.cache.layers[index]
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
        turn=session.stats.turn,
        turn_start=session.turn_start,
        output_index=session.output_index,
        final=context.final,
        scaling=call.scaling,
        softcap=call.softcap,
        record=LayerRecord(session.stats, index),
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


def _many_rows(
    context: ForwardContext, call: LayerCall, policies: LayerPolicies, queries: Tensor, shown: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return the output and, for sinks, the log-sum-exp; None where it is left to the engine that stores the pairs."""
    need_lse = call.sinks is not None
    inputs = _inputs(context, call, policies, queries)
    found: tuple[Tensor, Tensor | None] | None
    if context.phase is Phase.OBSERVE:
        found = _dense(inputs, need_lse, columns=inputs.columns)
        pair = inputs.keys.shape[2] + inputs.values.shape[2]
        stored = inputs.keys.shape[0] * inputs.keys.shape[1]
        context.session.stats.read("observation", stored * pair * inputs.keys.element_size())
    else:
        found = _sparse(context, policies, inputs, need_lse)
        if found is None and not context.hosted:
            found = _dense(inputs, need_lse)
    if shown:
        _after(context, policies, inputs)
    return found


def _sparse(
    context: ForwardContext, policies: LayerPolicies, inputs: AttentionInputs, need_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return attention on what the sparsifier chooses.

    None where every pair is to be attended: it chose so in a hosted session, may not choose, or broke its contract.
    """
    session, sparsifier = context.session, policies.sparsifier
    assert sparsifier is not None
    everything = DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)
    if not session.is_enabled(policies.prefill_slot):
        _report(context, inputs, everything)
        return None
    moment = "sparsify"
    try:
        pattern = session.guard.ask(sparsifier, sparsifier.sparsify, inputs)
        check_pattern(pattern, inputs)
        if context.hosted and isinstance(pattern, DensePattern):
            _report(context, inputs, pattern)
            return None
        moment = "the attend of its pattern"
        found = check_output(pattern, session.guard.attend(sparsifier, pattern, inputs, need_lse), inputs, need_lse)
        _report(context, inputs, pattern)
    except FAULTS as error:
        _failed(session, policies.prefill_slot, error, moment, inputs)
        _report(context, inputs, everything)
        return None
    return found


def _failed(session: Session, slot: str, error: BaseException, moment: str, inputs: AttentionInputs) -> None:
    """Deal with a policy's fault, unless what it was given were no numbers."""
    if getattr(error, "fault", None) is not Fault.WROTE and not bool(inputs.queries.isfinite().all()):
        raise ModelError(
            f"the model's queries of layer {inputs.layer.index} are not finite numbers: its weights are damaged or its dtype "
            "overflows; load it in another dtype"
        ) from error
    session.failed(slot, error, moment, inputs.layer.index)


def _dense(inputs: AttentionInputs, need_lse: bool, columns: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return dense_attention(
        inputs.queries,
        inputs.keys,
        inputs.values,
        scaling=inputs.scaling,
        softcap=inputs.softcap,
        columns=columns,
        first_valid=inputs.first_valid,
        need_lse=need_lse,
    )


def _after(context: ForwardContext, policies: LayerPolicies, inputs: AttentionInputs) -> None:
    """Let the compressor observe."""
    session, compressor = context.session, policies.compressor
    if not policies.observes_after or not session.is_enabled(policies.decode_slot):
        return
    assert compressor is not None
    try:
        session.guard.ask(compressor, compressor.after_attention, inputs, session.states[policies.decode_slot])
    except FAULTS as error:
        _failed(session, policies.decode_slot, error, "after_attention", inputs)


def _before(context: ForwardContext, policies: LayerPolicies, inputs: AttentionInputs) -> bool:
    """Let the compressor select for this very step. True if it did, so that what the inputs say of the selection, and after an
    eviction of the store, is no longer true.
    """
    session, compressor = context.session, policies.compressor
    assert compressor is not None
    cache = session.cache.layers[inputs.layer.index]
    try:
        selection = session.guard.ask(
            compressor, compressor.before_attention, inputs, session.states[policies.decode_slot]
        )
        if selection is None:
            return False
        check_selection(selection, cache, policies.retention, policies.most_pairs, session.output_index + 1)
        cache.select(selection)
        context.reselected = True
    except FAULTS as error:
        _failed(session, policies.decode_slot, error, "before_attention", inputs)
    return True


def _report(context: ForwardContext, inputs: AttentionInputs, pattern: AttentionPattern) -> None:
    rows, total = inputs.new_tokens, inputs.total_tokens
    causal = rows * (total - rows) + rows * (rows + 1) // 2
    started = time.perf_counter()
    stats = context.session.stats
    stats.pattern(inputs.layer.index, pattern, causal)
    if context.measure:
        inputs.record.mean("coverage_realised", _realised(inputs, pattern))
    stats.measuring_s += time.perf_counter() - started


def _realised(inputs: AttentionInputs, pattern: AttentionPattern) -> Tensor:
    """Share of the attention mass inside the pattern over all rows, per head ``[Hq]``."""
    if isinstance(pattern, DensePattern):
        return torch.ones(inputs.queries.shape[0], dtype=torch.float32, device="cpu")
    return inputs.coverage(pattern, torch.arange(inputs.new_tokens, device=inputs.queries.device))


@dataclass
class _DecodeStep:
    """Hold one session's decode step of one layer while the kernel works on the steps of all sessions."""

    policies: LayerPolicies
    queries: Tensor
    request: DecodeRequest | None  # None: left to the engine that stores the pairs
    inputs: AttentionInputs | None  # what the compressor was shown, if it made no selection
    observes: bool


def _select(
    context: ForwardContext, call: LayerCall, policies: LayerPolicies, queries: Tensor, shown: bool
) -> _DecodeStep:
    """Let the compressor select for this step, and say which pairs the queries attend to."""
    session, index = context.session, policies.spec.index
    cache = session.cache.layers[index]
    assert cache.store is not None
    inputs = None
    if shown and policies.selects_before:
        inputs = _inputs(context, call, policies, queries)
        if _before(context, policies, inputs):
            inputs = None
    store, active = cache.store, cache.active
    attended = store.pairs if active is None else active.attended(cache.seen)
    dense = store.heads * cache.seen
    context.compressed |= attended < dense
    session.stats.attended(attended, dense, store.pair_bytes)
    if session.attention_map is not None:
        session.attention_map.add(index, *cache.attended(), store.heads, cache.seen)
    request = None if context.hosted and active is None else _request(cache, queries)
    return _DecodeStep(policies, queries, request, inputs, observes=policies.observes_after and shown)


def _request(cache: LayerCache, queries: Tensor) -> DecodeRequest:
    """Return what the kernel is asked: attention over the store, a copy of the selected pairs, or the selected ones in place."""
    store, active = cache.store, cache.active
    assert store is not None
    if active is None:
        return DecodeRequest(queries, store.keys, store.values, cache.first_valid)
    if active.pairs is not None:
        return DecodeRequest(queries, active.pairs.keys, active.pairs.values, active.first_valid)
    chosen, rows = active.selection, store.rows  # nothing was evicted, so positions are columns
    assert rows is not None
    return DecodeRequest(queries, *rows, None, chosen.indices, chosen.boundary)


def _observe_step(context: ForwardContext, call: LayerCall, step: _DecodeStep) -> None:
    """Let the compressor see a decode step that is done."""
    _after(context, step.policies, step.inputs or _inputs(context, call, step.policies, step.queries))


def _as_the_model_defines(context: ForwardContext, call: LayerCall, queries: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute a layer that no policy touches: dense within its window or chunk."""
    if context.session.slots.by_layer[call.layer].spec.type is LayerType.CHUNKED:
        return _within_chunks(context, call, queries)
    store, window = context.session.cache.layers[call.layer].store, call.window
    assert store is not None
    columns = (
        context.positions if context.phase is Phase.OBSERVE else None
    )  # nothing is evicted here: column = position
    keys, values = store.keys, store.values
    if window is not None and columns is None:
        reach = window - 1 + queries.shape[1]
        keys, values = keys[:, -reach:], values[:, -reach:]
    output: Tensor
    lse: Tensor | None
    output, lse = dense_attention(
        queries,
        keys,
        values,
        scaling=call.scaling,
        softcap=call.softcap,
        window=window,
        columns=columns,
        need_lse=call.sinks is not None,
    )
    return output, lse


def _within_chunks(context: ForwardContext, call: LayerCall, queries: Tensor) -> tuple[Tensor, Tensor | None]:
    """Compute a layer whose tokens attend to the tokens of their own chunk: positions ``n * size`` to ``(n + 1) * size - 1``."""
    store, size = context.session.cache.layers[call.layer].store, call.window
    assert store is not None and size is not None
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    positions = context.positions  # sorted, and nothing is evicted here: column = position
    counts = torch.unique_consecutive(positions // size, return_counts=True)[1].tolist()
    for own, rows in zip(positions.split(counts), queries.split(counts, dim=1), strict=True):
        start = int(own[0]) // size * size
        end = int(own[-1]) + 1
        output, lse = dense_attention(
            rows,
            store.keys[:, start:end],
            store.values[:, start:end],
            scaling=call.scaling,
            softcap=call.softcap,
            columns=None if len(own) == end - int(own[0]) else own - start,
            need_lse=call.sinks is not None,
        )
        outputs.append(output)
        sums += [] if lse is None else [lse]
    return torch.cat(outputs, dim=1), torch.cat(sums, dim=1) if sums else None
