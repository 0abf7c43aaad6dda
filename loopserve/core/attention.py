"""One layer's attention in one forward pass of one session: the only caller of a policy's per-layer methods.

The bridge hands over rotated queries; what comes back is the layer's attention output. Knows no model family.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loopserve.core.faults import FAULTS
from loopserve.core.interfaces import AttentionInputs, LayerType, Phase
from loopserve.core.judging import check_output, check_pattern, check_selection
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
        columns = cache.counted(total - queries.shape[1], total, queries.device)
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
        strict=session.guard.strict,
    )


def _columns_of(positions: Tensor, stored: Tensor) -> Tensor:
    """Columns of positions of this turn, which every head holds at the same places."""
    row = stored if stored.dim() == 1 else stored[0]
    return torch.searchsorted(row, positions)


def _many_rows(
    call: Call, policies: LayerPolicies, queries: Tensor, scaling: float, softcap: float | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    inputs = _inputs(call, policies, queries, scaling, softcap)
    if call.phase is Phase.OBSERVE:
        output, lse = _dense(inputs, need_lse, columns=inputs.columns)
        pair = inputs.keys.shape[2] + inputs.values.shape[2]
        stored = inputs.keys.shape[0] * inputs.keys.shape[1]
        call.session.stats.read("observation", stored * pair * inputs.keys.element_size())
    else:
        output, lse = _sparse(call, policies, inputs, need_lse) or _plain(call, inputs, need_lse)
    if call.observer in (None, id(policies.compressor)):
        _after(call, policies, inputs)
    return output, lse


def _sparse(
    call: Call, policies: LayerPolicies, inputs: AttentionInputs, need_lse: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Attention on what the sparsifier chooses; None if it may not choose, or broke its contract."""
    session, sparsifier = call.session, policies.sparsifier
    assert sparsifier is not None
    if not session.trusts(sparsifier):
        return None
    moment = "sparsify"
    try:
        pattern = session.guard.ask(sparsifier, sparsifier.sparsify, inputs)
        check_pattern(pattern, inputs)
        moment = "the attend of its pattern"
        found = check_output(pattern, session.guard.attend(sparsifier, pattern, inputs, need_lse), inputs, need_lse)
        _report(call, inputs, pattern)
    except FAULTS as error:
        session.failed(sparsifier, error, moment, inputs.layer.index)
        return None
    return found


def _plain(call: Call, inputs: AttentionInputs, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention on everything, in place of a sparsifier."""
    _report(call, inputs, DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens))
    return _dense(inputs, need_lse)


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


def _after(call: Call, policies: LayerPolicies, inputs: AttentionInputs) -> None:
    """Let the compressor observe."""
    session, compressor = call.session, policies.compressor
    if not policies.watches_after or not session.trusts(compressor):
        return
    assert compressor is not None
    try:
        session.guard.ask(compressor, compressor.after_attention, inputs, session.states[id(compressor)])
    except FAULTS as error:
        session.failed(compressor, error, "after_attention", inputs.layer.index)


def _before(call: Call, policies: LayerPolicies, inputs: AttentionInputs) -> bool:
    """Let the compressor select for this very step. True if it did, so that what the inputs say of the selection, and after an
    eviction of the store, is no longer true.
    """
    session, compressor = call.session, policies.compressor
    assert compressor is not None
    cache = session.cache.layers[inputs.layer.index]
    try:
        selection = session.guard.ask(compressor, compressor.before_attention, inputs, session.states[id(compressor)])
        if selection is None:
            return False
        check_selection(selection, cache, policies.retention, policies.most_pairs, session.output_index + 1)
        cache.select(selection)
        call.reselected = True
    except FAULTS as error:
        session.failed(compressor, error, "before_attention", inputs.layer.index)
    return True


def _report(call: Call, inputs: AttentionInputs, pattern: AttentionPattern) -> None:
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
        return torch.ones(inputs.queries.shape[0], dtype=torch.float32, device="cpu")
    rows = torch.arange(inputs.new_tokens, device=inputs.queries.device)
    mass = torch.zeros(inputs.queries.shape[0], dtype=torch.float32, device=inputs.queries.device)
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
    watched = cache.stored > policies.unwatched_pairs and session.trusts(policies.compressor)
    if policies.watches_before and watched:
        inputs = _inputs(call, policies, queries, scaling, softcap)
        if _before(call, policies, inputs):
            inputs = None
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
    if policies.watches_after and watched:
        _after(call, policies, inputs or _inputs(call, policies, queries, scaling, softcap))
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
