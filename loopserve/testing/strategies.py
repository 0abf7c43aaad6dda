"""Offer hypothesis strategies: attention inputs, patterns and selections of every form. MissingExtra without hypothesis."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern, DensePattern, LinePattern, RowGroups
from loopserve.testing.extra import require
from loopserve.testing.inputs import make_inputs

require("hypothesis", "loopserve.testing.strategies")

from hypothesis import strategies as st  # noqa: E402  # noqa: E402  # importable only after the check above

_KINDS = ("dense", "lines", "window", "blocks", "row groups")


@st.composite
def attention_inputs(
    draw: st.DrawFn,
    *,
    phase: Phase = Phase.PREFILL,
    max_tokens: int = 96,
    min_new_tokens: int = 1,
    evictions: bool = True,
) -> AttentionInputs:
    """Draw any call: turn one (no history) or later, groups of 1, 2 and 4, noise or structure, with or without evicted pairs."""
    total = draw(st.integers(max(2, min_new_tokens), max_tokens), label="total_tokens")
    new = 1 if phase is Phase.DECODE else draw(st.integers(min_new_tokens, total), label="new_tokens")
    history = total - new
    evicted = draw(st.integers(0, 20), label="evicted") if evictions and history else 0
    kv_heads = draw(st.integers(1, 3), label="kv_heads")
    ragged = draw(st.integers(0, history - 1), label="ragged") if evicted and history > 1 and kv_heads > 1 else 0
    return make_inputs(
        new_tokens=new,
        total_tokens=total,
        kv_heads=kv_heads,
        group=draw(st.sampled_from([1, 2, 4]), label="group"),
        head_dim=draw(st.sampled_from([4, 16]), label="head_dim"),
        seed=draw(st.integers(0, 2**16), label="seed"),
        structured=draw(st.booleans(), label="structured"),
        evicted=evicted,
        ragged=ragged,
        phase=phase,
        turn=draw(st.integers(0, 3), label="turn"),
    )


@st.composite
def patterns(draw: st.DrawFn, *, size: tuple[int, int, int] | None = None, max_tokens: int = 160) -> AttentionPattern:
    """Draw a pattern of any built-in form, from nearly empty to dense.

    size: (query heads, new tokens, total tokens) of the call it is for; any up to ``max_tokens`` by default.
    """
    if size is None:
        total = draw(st.integers(1, max_tokens), label="total_tokens")
        size = draw(st.sampled_from([1, 2, 4]), label="heads"), draw(st.integers(1, total), label="new_tokens"), total
    heads, new, total = size
    kind = draw(st.sampled_from(_KINDS if new > 1 else _KINDS[:-1]), label="pattern")
    if kind == "dense":
        return DensePattern(heads, new, total)
    if kind == "row groups":
        first = draw(st.integers(1, new - 1), label="rows of the first group")
        parts = patterns(size=(heads, first, total - new + first)), patterns(size=(heads, new - first, total))
        return RowGroups(tuple(draw(part) for part in parts))
    share = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]), label="share of lines or blocks")
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))
    if kind == "blocks":
        tile = draw(st.sampled_from([4, 16, 64]), label="tile")
        return BlockPattern(_some(source, share, heads, -(-new // tile), -(-total // tile)), new, total, tile)
    verticals = _some(source, share, heads, total)
    if kind == "window":
        return LinePattern.window(heads, new, total, verticals, draw(st.integers(1, 2 * total), label="local window"))
    dense = _some(source, 0.5, heads) if draw(st.booleans(), label="some heads are dense") else None
    return LinePattern(verticals, _some(source, share, heads, total), new, dense)


@st.composite
def selections(
    draw: st.DrawFn,
    *,
    kv_heads: int | None = None,
    length: int | None = None,
    ragged: bool = True,
    retention: Retention = Retention.KEEP,
) -> KVSelection:
    """Draw a valid selection of the first ``length`` positions, from nothing to everything before any boundary.

    ragged: KV heads may keep different numbers of pairs.
    """
    kv_heads = draw(st.integers(1, 4), label="kv_heads") if kv_heads is None else kv_heads
    length = draw(st.integers(1, 96), label="length") if length is None else length
    boundary = draw(st.integers(0, length), label="boundary")
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**16), label="seed"))
    kept = draw(st.integers(0, boundary), label="kept")
    counts = [kept] * kv_heads
    if ragged and draw(st.booleans(), label="heads differ"):
        counts = [draw(st.integers(0, boundary), label=f"kept by head {head}") for head in range(kv_heads)]
    heads = [torch.randperm(boundary, generator=source, device="cpu")[:count].sort().values for count in counts]
    return KVSelection.from_heads(heads, boundary, retention)


def _some(source: torch.Generator, share: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=source, dtype=torch.float32, device="cpu") < share
