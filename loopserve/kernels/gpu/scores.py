"""Compute softmax rows over all keys without storing the scores of all heads.

The first pass computes the log-sum-exp of each row, with the keys split over programs. The second pass computes the
probabilities tile by tile, and writes or sums them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import (
    attention_tile,
    launch,
    padded,
    precision,
    processors,
    readable,
    score_factors,
)
from loopserve.kernels.gpu.lines import line_masses
from loopserve.kernels.gpu.tiles import load_rows, scored

_LEAST_KEYS = 512  # per part


@triton.jit(do_not_specialize=["rows", "total", "part_keys"])
def row_sums_kernel(
    q: tl.tensor,
    k: tl.tensor,
    columns: tl.tensor,
    first_valid: tl.tensor,
    lse: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    part_keys: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FILLER: tl.constexpr,
) -> None:
    """Compute base-2 log-sum-exps per part of the keys, ``[parts, Hkv, GROUP * rows]``.

    Grid: tiles of rows, parts, KV heads.
    """
    part = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < GROUP * rows
    column = tl.load(columns + row % rows, mask=inside, other=-1).to(tl.int32)
    begin = part * part_keys
    end = tl.minimum(tl.minimum(begin + part_keys, total), tl.max(column, 0) + 1)
    if HAS_FILLER:
        begin = tl.maximum(begin, tl.load(first_valid + head).to(tl.int32))
    q_tile = load_rows(q + head * GROUP * rows * CHANNELS, row, CHANNELS, inside, CHANNELS, PADDED)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    for key0 in range(begin, end, KEYS):
        keys = key0 + tl.arange(0, KEYS)
        held = keys < end
        k_tile = load_rows(k + head * k_head, keys, k_row, held, CHANNELS, PADDED)
        scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
        scores = tl.where(held[None, :] & (keys[None, :] <= column[:, None]), scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        peak = higher
    found = tl.where(sums == 0.0, float("-inf"), peak + tl.log2(tl.where(sums == 0.0, 1.0, sums)))
    place = (part * tl.num_programs(2) + head) * GROUP * rows
    tl.store(lse + place + row, found, mask=inside)


@triton.jit(do_not_specialize=["rows", "total", "factor"])
def row_masses_kernel(
    q: tl.tensor,
    k: tl.tensor,
    columns: tl.tensor,
    first_valid: tl.tensor,
    lse: tl.tensor,
    probabilities: tl.tensor,
    masses: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    factor: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FILLER: tl.constexpr,
    WRITES: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Reduce rows per key. Grid: tiles of keys, KV heads.

    WRITES: store each row in ``probabilities`` and the sum of each query head in ``masses [Hq, n]``. Otherwise sum over
    the heads of a group, times ``factor``, in ``masses [Hkv, n]``. LARGEST: reduce the rows of a head by maximum
    instead of sum.
    """
    head = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    oldest = 0
    if HAS_FILLER:
        oldest = tl.load(first_valid + head).to(tl.int32)
    within = keys < total
    held = within & (keys >= oldest)
    k_tile = load_rows(k + head * k_head, keys, k_row, held, CHANNELS, PADDED)
    whole = tl.zeros([KEYS], tl.float32)
    for member in range(GROUP):
        place = (head * GROUP + member) * rows
        joined = tl.zeros([KEYS], tl.float32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = row < rows
            column = tl.load(columns + row, mask=inside, other=-1).to(tl.int32)
            base = tl.load(lse + place + row, mask=inside, other=float("-inf"))
            q_tile = load_rows(q + place * CHANNELS, row, CHANNELS, inside, CHANNELS, PADDED)
            scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
            seen = held[None, :] & (keys[None, :] <= column[:, None])
            # A row that sees no key has base -inf. Its cells are all masked, so the base is replaced by a finite one.
            base = tl.where(base == float("-inf"), 0.0, base)
            found = tl.where(seen, tl.exp2(scores - base[:, None]), 0.0)
            if WRITES:
                target = probabilities + (place + row.to(tl.int64))[:, None] * total + keys[None, :]
                tl.store(target, found, mask=inside[:, None] & within[None, :])
            if LARGEST:
                joined = tl.maximum(joined, tl.max(found, 0))
            else:
                joined += tl.sum(found, 0)
        if WRITES:
            tl.store(masses + (head * GROUP + member) * total + keys, joined, mask=within)
        else:
            whole += joined
    if not WRITES:
        tl.store(masses + head * total + keys, whole * factor, mask=within)


def row_masses(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    writes: bool,
    largest: bool = False,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return probabilities ``[Hq, r, n]`` and sums over rows ``[Hq, n]`` if ``writes``; else None and the reduced rows
    summed over each group, times ``factor``, ``[Hkv, n]``.

    All are float32.
    """
    queries, keys, columns = queries.contiguous(), readable(keys), columns.contiguous()
    heads, rows, channels = queries.shape
    owners, total = keys.shape[:2]
    group = heads // owners
    shape = attention_tile(queries, channels)
    tile_rows = min(shape.rows, padded(group * rows))
    tiles = -(-group * rows // tile_rows)
    parts = min(max(1, 2 * processors(queries.device) // (tiles * owners)), -(-total // _LEAST_KEYS))
    part_keys = -(-total // (parts * shape.keys)) * shape.keys
    parts = -(-total // part_keys)
    lse = torch.empty(parts, heads * rows, dtype=torch.float32, device=queries.device)
    shared = {
        "KEYS": shape.keys,
        "GROUP": group,
        "CHANNELS": channels,
        "PADDED": padded(channels),
        "SOFTCAP": bool(softcap),
        "PRECISION": precision(queries.dtype),
        "HAS_FILLER": first_valid is not None,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }
    factors = score_factors(scaling, softcap)
    filler = lse if first_valid is None else first_valid.contiguous()
    strides = keys.stride(0), keys.stride(1)
    launch(
        row_sums_kernel,
        (tiles, parts, owners),
        queries,
        keys,
        columns,
        filler,
        lse,
        *strides,
        rows,
        total,
        part_keys,
        *factors,
        ROWS=tile_rows,
        **shared,
    )
    joined = lse[0] if parts == 1 else _joined(lse)
    probabilities = torch.empty(heads, rows, total, dtype=torch.float32, device=queries.device) if writes else lse
    masses = torch.empty(heads if writes else owners, total, dtype=torch.float32, device=queries.device)
    launch(
        row_masses_kernel,
        (-(-total // shape.keys), owners),
        queries,
        keys,
        columns,
        filler,
        joined,
        probabilities,
        masses,
        *strides,
        rows,
        total,
        factor,
        *factors,
        ROWS=min(shape.rows, padded(rows)),
        WRITES=writes,
        LARGEST=largest,
        **shared,
    )
    return probabilities, masses


def _joined(parts: Tensor) -> Tensor:
    """Merge base-2 log-sum-exps of parts ``[P, R]`` to ``[R]``."""
    peak = parts.amax(0)
    base = peak.masked_fill(peak == float("-inf"), 0.0)
    return (parts - base).exp2().sum(0).log2() + base


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute line masses on a GPU.

    One kernel computes the rows and their sums per column, another the diagonals. Neither uses atomics, so equal inputs
    give equal bits.
    """
    rows, vertical = row_masses(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid, writes=True
    )
    return rows, vertical, line_masses(rows, columns, slashes_only=True)


def token_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    over_rows: str,
) -> Tensor:
    """Compute token scores on a GPU in two passes over the keys, without storing the scores of query heads."""
    group = queries.shape[0] // keys.shape[0]
    return row_masses(
        queries,
        keys,
        columns,
        scaling=scaling,
        softcap=softcap,
        first_valid=first_valid,
        writes=False,
        largest=over_rows == "max",
        factor=1.0 / (group * queries.shape[1] if over_rows == "mean" else group),
    )[1]
