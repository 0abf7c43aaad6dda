"""One layer's attention in one forward pass of one session: the only caller of a policy's per-layer methods.

The bridge hands over rotated queries; what comes back is the layer's attention output. Knows no model family.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loopserve.core.cache import counted
from loopserve.core.errors import PolicyError
from loopserve.core.interfaces import AttentionInputs, DecodeCompressor, KVSelection, LayerType, Phase
from loopserve.core.patterns import AttentionPattern, DensePattern
from loopserve.core.session import LayerPolicies, Session
from loopserve.core.stats import LayerRecord
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.line_scores import line_scores

_MEASURED_ROWS = 128  # rows per step when coverage is measured over all rows


@dataclass
class Call:
    """One forward pass of one session: where its tokens stand, and what its layers found so far."""

    session: Session
    phase: Phase
    positions: Tensor  # int64 [T], original positions of the tokens fed
    final: bool = True
    measure: bool = False  # realised coverage over all rows, costly
    observer: int | None = None  # the compressor (key in the session) that an observation pass is for
    seen_after: int = 0  # length of every layer once its new pairs are in
    compressed: bool = False
    reselected: bool = False  # some layer was given another selection
    memos: dict[int, dict[Any, Any]] = field(default_factory=dict)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The new pairs ``[Hkv, T, D]`` of a layer. An observation looks at pairs that are stored already, and adds none."""
        if self.phase is not Phase.OBSERVE:
            self.session.cache.layers[layer].append(keys, values)


def attend(
    call: Call,
    layer: int,
    queries: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output ``[Hq, T, D]`` of one layer for rotated queries ``[Hq, T, D]``; the layer's pairs are appended already.

    window: sliding window in tokens, own token included. sinks ``[Hq]``: logits of a virtual key without value that only takes
    mass (gpt-oss).
    """
    policies = call.session.policies[layer]
    need_lse = sinks is not None
    if policies.spec.type is not LayerType.FULL or window is not None:
        output, lse = _as_the_model_has_it(call, layer, queries, scaling, softcap, window, need_lse)
    elif call.phase is Phase.DECODE:
        output, lse = _decode(call, policies, queries, scaling, softcap, need_lse)
    else:
        output, lse = _many_rows(call, policies, queries, scaling, softcap, need_lse)
    if sinks is not None:
        assert lse is not None
        output = output * torch.sigmoid(lse - sinks.float()[:, None])[..., None].to(output.dtype)
    return output


def check_retention(compressor: DecodeCompressor[Any], selection: KVSelection) -> None:
    """PolicyError for a selection that keeps or evicts otherwise than its policy declares; undo relies on it."""
    if selection.retention is not compressor.retention:
        raise PolicyError(
            f"{compressor.name}: a selection says {selection.retention}, the policy declares {compressor.retention}"
        )


def _inputs(
    call: Call, policies: LayerPolicies, queries: Tensor, scaling: float, softcap: float | None
) -> AttentionInputs:
    session, index = call.session, policies.spec.index
    cache = session.cache.layers[index]
    assert cache.store is not None
    total = cache.stored
    if call.phase is Phase.OBSERVE:
        columns = _columns_of(call.positions, cache.positions())
    else:
        columns = counted(total - queries.shape[1], total, queries.device)
    return AttentionInputs(
        queries=queries,
        keys=cache.store.keys,
        values=cache.store.values,
        columns=columns,
        positions=cache.positions(),
        first_valid=cache.first_valid,
        layer=policies.spec,
        phase=call.phase,
        turn=session.stats.turn,
        turn_start=session.turn_start,
        output_index=session.output_index,
        final=call.final,
        scaling=scaling,
        softcap=softcap,
        record=LayerRecord(session.stats, index),
        selection=cache.active.selection if cache.active is not None else None,
        memo=call.memos.setdefault(index, {}),
        notebook=session.states[id(policies.sparsifier)],
        ruled=session.ruled_by(id(policies.compressor)),
    )


def _columns_of(positions: Tensor, stored: Tensor) -> Tensor:
    """Columns of positions of this turn, which every head holds at the same places."""
    row = stored if stored.dim() == 1 else stored[0]
    return torch.searchsorted(row, positions)


def _many_rows(
    call: Call, policies: LayerPolicies, queries: Tensor, scaling: float, softcap: float | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    inputs = _inputs(call, policies, queries, scaling, softcap)
    output: Tensor
    lse: Tensor | None
    if call.phase is Phase.OBSERVE:
        output, lse = dense_attention(
            queries,
            inputs.keys,
            inputs.values,
            scaling=scaling,
            softcap=softcap,
            columns=inputs.columns,
            first_valid=inputs.first_valid,
            need_lse=need_lse,
        )
        pair = inputs.keys.shape[2] + inputs.values.shape[2]
        stored = inputs.keys.shape[0] * inputs.keys.shape[1]
        call.session.stats.read("observation", stored * pair * inputs.keys.element_size())
    else:
        assert policies.sparsifier is not None
        pattern = policies.sparsifier.sparsify(inputs)
        _report(call, inputs, pattern)
        output, lse = pattern.attend(
            queries,
            inputs.keys,
            inputs.values,
            scaling=scaling,
            softcap=softcap,
            first_valid=inputs.first_valid,
            need_lse=need_lse,
        )
    if policies.watches_after and call.observer in (None, id(policies.compressor)):
        assert policies.compressor is not None
        policies.compressor.after_attention(inputs, call.session.states[id(policies.compressor)])
    return output, lse


def _report(call: Call, inputs: AttentionInputs, pattern: AttentionPattern) -> None:
    if not isinstance(pattern, AttentionPattern):
        raise PolicyError(
            f"layer {inputs.layer.index}: sparsify must return an AttentionPattern, got {type(pattern).__name__}"
        )
    rows, total = inputs.new_tokens, inputs.total_tokens
    causal = rows * (total - rows) + rows * (rows + 1) // 2
    started = time.perf_counter()
    stats = call.session.stats
    stats.pattern(inputs.layer.index, pattern, causal)
    if call.measure:
        inputs.record.mean("coverage_realised", _realised(inputs, pattern))
    stats.measuring_s += time.perf_counter() - started


def _realised(inputs: AttentionInputs, pattern: AttentionPattern) -> Tensor:
    """Share of the attention mass inside the pattern over all rows, per head ``[Hq]``."""
    if isinstance(pattern, DensePattern):
        return torch.ones(inputs.queries.shape[0])
    rows = torch.arange(inputs.new_tokens, device=inputs.queries.device)
    mass = torch.zeros(inputs.queries.shape[0], device=inputs.queries.device)
    for part in rows.split(_MEASURED_ROWS):
        scores = line_scores(
            inputs.queries[:, part],
            inputs.keys,
            inputs.columns[part],
            scaling=inputs.scaling,
            softcap=inputs.softcap,
            first_valid=inputs.first_valid,
        )
        mass += pattern.coverage(scores.probabilities, inputs.columns[part]) * len(part)
    return mass / inputs.new_tokens


def _decode(
    call: Call, policies: LayerPolicies, queries: Tensor, scaling: float, softcap: float | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    session, index = call.session, policies.spec.index
    cache = session.cache.layers[index]
    assert cache.store is not None
    inputs = None
    if policies.watches_before:
        inputs = _inputs(call, policies, queries, scaling, softcap)
        assert policies.compressor is not None
        selection = policies.compressor.before_attention(inputs, session.states[id(policies.compressor)])
        if selection is not None:
            check_retention(policies.compressor, selection)
            cache.select(selection)
            call.reselected = True
            inputs = None  # what it says of the selection, and after an eviction of the store, is no longer true
    store = cache.store
    active, pairs, first_valid, columns, tail = cache.active, store, cache.first_valid, None, 0
    if active is None:
        attended = store.heads * store.length - (int(first_valid.sum()) if first_valid is not None else 0)
    else:
        attended = active.attended(cache.seen)
        if active.pairs is not None:
            pairs, first_valid = active.pairs, active.first_valid
        else:  # in place: nothing was evicted, so positions are columns
            columns, tail = active.selection.indices, active.selection.boundary
    call.compressed |= attended < store.heads * cache.seen
    session.stats.attended(attended, store.heads * cache.seen, store.pair_bytes)
    output, lse = decode_attention(
        queries,
        pairs.keys,
        pairs.values,
        scaling=scaling,
        softcap=softcap,
        first_valid=first_valid,
        columns=columns,
        tail=tail,
        need_lse=need_lse,
    )
    if policies.watches_after:
        assert policies.compressor is not None
        inputs = inputs or _inputs(call, policies, queries, scaling, softcap)
        policies.compressor.after_attention(inputs, session.states[id(policies.compressor)])
    return output, lse


def _as_the_model_has_it(
    call: Call, layer: int, queries: Tensor, scaling: float, softcap: float | None, window: int | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """A layer that no policy touches: dense within its window."""
    store = call.session.cache.layers[layer].store
    assert store is not None
    columns = call.positions if call.phase is Phase.OBSERVE else None  # nothing is evicted here: column = position
    keys, values = store.keys, store.values
    if window is not None and columns is None:
        reach = window - 1 + queries.shape[1]
        keys, values = keys[:, -reach:], values[:, -reach:]
    output: Tensor
    lse: Tensor | None
    output, lse = dense_attention(
        queries, keys, values, scaling=scaling, softcap=softcap, window=window, columns=columns, need_lse=need_lse
    )
    return output, lse
