"""Compute one layer's attention for every session of a forward pass.

With ``decode_step`` and ``policy_calls`` the only caller of a policy's per-layer methods.

The bridge hands over rotated queries of sessions whose new pairs are stored; what comes back is the layer's attention output.
Knows no model family.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve.core.engine.decode_step import DecodeStep, attend_steps
from loopserve.core.engine.forward import ForwardContext, LayerCall
from loopserve.core.engine.policy_calls import failed, inputs_of, keep_apart, observe, shows
from loopserve.core.engine.slots import LayerPolicies
from loopserve.core.guard.faults import FAULTS
from loopserve.core.guard.guard import check_output, check_pattern
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.layers import LayerType
from loopserve.core.policy.patterns import AttentionPattern, DensePattern
from loopserve.kernels.dense_attention import dense_attention


def attend(contexts: Sequence[ForwardContext], call: LayerCall, queries: Sequence[Tensor]) -> list[Tensor]:
    """Return one layer's attention output ``[Hq, T, D]`` per session, for its rotated queries ``[Hq, T, D]``.

    The decode steps of all sessions go through one kernel call that chooses and one that attends. An error of one session among
    several is kept in its context, and its output is zero from there on.
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
    steps: dict[int, DecodeStep] = {}
    for index, (context, rows) in enumerate(zip(contexts, queries, strict=True)):
        if context.error is not None:
            continue
        try:
            policies = context.session.slots.by_layer[call.layer]
            plain = policies.spec.type is not LayerType.FULL or call.window is not None
            shown = not plain and shows(context, policies)
            if plain:
                outputs[index] = _with_sinks(call, *_as_the_model_defines(context, call, rows))
            elif context.phase is Phase.DECODE:
                steps[index] = DecodeStep(context, call, policies, rows, shown)
            elif (found := _many_rows(context, call, policies, rows, shown)) is not None:
                outputs[index] = _with_sinks(call, *found)
        except Exception as error:
            keep_apart(context, error)
    for index, output in attend_steps(steps, call).items():
        outputs[index] = _with_sinks(call, *output)
    for step in steps.values():
        step.run(step.observe)
    for context in contexts:
        if context.gathered is not None:
            context.gathered.release()
            context.gathered = None
    return [None if context.error is not None else output for context, output in zip(contexts, outputs, strict=True)]


def _with_sinks(call: LayerCall, output: Tensor, lse: Tensor | None) -> Tensor:
    """Take the mass of the virtual keys out of an output ``[Hq, T, D]``."""
    if call.sinks is None:
        return output
    assert lse is not None
    return output * torch.sigmoid(lse - call.sinks.float()[:, None])[..., None].to(output.dtype)


def _many_rows(
    context: ForwardContext, call: LayerCall, policies: LayerPolicies, queries: Tensor, shown: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Return the output and, for sinks, the log-sum-exp; None where it is left to the engine that stores the pairs."""
    need_lse = call.sinks is not None
    inputs = inputs_of(context, call, policies, queries)
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
        observe(context, policies, inputs)
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
    if not session.slots.break_even.allows_sparse(inputs.new_tokens, inputs.total_tokens):
        inputs.record.count("fallback:below_break_even")
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
        failed(session, policies.prefill_slot, error, moment, inputs)
        _report(context, inputs, everything)
        return None
    return found


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
