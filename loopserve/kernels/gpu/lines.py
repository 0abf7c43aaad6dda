"""Compute the mass along vertical and slash lines of sampled rows, each cell counted for the line of the lowest rank.

Line ``kind * n + x`` is vertical x (key column x) for kind 0 and slash x (offset x) for kind 1. In a row at column c,
line x of either kind meets line c - x of the other kind in one cell. The cell belongs to the line with the lower rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch

TAKEN = -1  # rank of a line whose cells are covered
FREE = 2**31 - 1  # rank of a line that is not tried
_LINES = 128
_ROWS = 16


@triton.jit
def finite(mass: tl.tensor) -> tl.tensor:
    """Return the mass, with 0 for values that are not finite."""
    return tl.where(tl.abs(mass) < float("inf"), mass, 0.0)


@triton.jit
def owned_cells(
    probabilities: tl.tensor,
    columns: tl.tensor,
    ranks: tl.tensor,
    line: tl.tensor,
    rank: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    RANKED: tl.constexpr,
) -> tl.tensor:
    """Return the mass ``[R, L]`` of the cells that lines hold in rows, and the lines of the other kind that meet them
    there.

    Lines below 0 hold none.
    """
    inside = row < rows
    column = tl.load(columns + row, mask=inside, other=-1).to(tl.int32)
    x = line % total
    other = column[:, None] - x[None, :]
    cell = tl.where((line < total)[None, :], x[None, :], other)
    held = inside[:, None] & (line >= 0)[None, :] & (other >= 0)
    met = tl.where((line < total)[None, :], other + total, other)
    if RANKED:
        held = held & (tl.load(ranks + head * 2 * total + met, mask=held, other=-1) > rank[None, :])
    start = (head * rows + row.to(tl.int64)) * total
    return finite(tl.load(probabilities + start[:, None] + cell, mask=held, other=0.0)), met


@triton.jit(do_not_specialize=["rows", "total", "count", "first"])
def line_masses_kernel(
    probabilities: tl.tensor,
    columns: tl.tensor,
    weights: tl.tensor,
    ranks: tl.tensor,
    lines: tl.tensor,
    wanted: tl.tensor,
    masses: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHED: tl.constexpr,
    RANKED: tl.constexpr,
    OWN_RANK: tl.constexpr,
    LISTED: tl.constexpr,
    ASKED: tl.constexpr,
) -> None:
    """Sum the mass of ``count`` lines per head. Grid: blocks of lines, heads.

    Computes the listed lines, or those from ``first`` on. RANKED: cells of lines with lower ranks do not count; without
    OWN_RANK only those of taken lines. ASKED: heads whose ``wanted`` is not above 0 are skipped.
    """
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * LINES + tl.arange(0, LINES)
    asked = True
    if ASKED:
        asked = tl.load(wanted + head) > 0
    if asked:
        if LISTED:
            line = tl.load(lines + head * count + slot, mask=slot < count, other=-1).to(tl.int32)
        else:
            line = tl.where(slot < count, slot + first, -1)
        rank = tl.full([LINES], -1, tl.int32)
        if OWN_RANK:
            rank = tl.load(ranks + head * 2 * total + line, mask=line >= 0, other=-1)
        sums = tl.zeros([LINES], tl.float32)
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            mass, _ = owned_cells(probabilities, columns, ranks, line, rank, head, row, rows, total, RANKED)
            if WEIGHED:
                mass *= tl.load(weights + head * rows + row, mask=row < rows, other=0.0)[:, None]
            sums += tl.sum(mass, 0)
        tl.store(masses + head * count + slot, sums, mask=slot < count)


@triton.jit(do_not_specialize=["rows", "total", "count"])
def take_lines_kernel(
    probabilities: tl.tensor,
    columns: tl.tensor,
    weights: tl.tensor,
    ranks: tl.tensor,
    lines: tl.tensor,
    gains: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Subtract the cells of the listed lines from the gains of the lines that cross them.

    Grid: blocks of lines, heads.
    """
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * LINES + tl.arange(0, LINES)
    line = tl.load(lines + head * count + slot, mask=slot < count, other=-1).to(tl.int32)
    rank = tl.load(ranks + head * 2 * total + line, mask=line >= 0, other=-1)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mass, met = owned_cells(probabilities, columns, ranks, line, rank, head, row, rows, total, True)
        mass *= tl.load(weights + head * rows + row, mask=row < rows, other=0.0)[:, None]
        tl.atomic_add(gains + head * 2 * total + met, -mass, mask=mass > 0.0, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "total"])
def covered_kernel(
    probabilities: tl.tensor,
    columns: tl.tensor,
    ranks: tl.tensor,
    covered: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    KEYS: tl.constexpr,
) -> None:
    """Sum the mass of a row on taken lines. Grid: rows, heads."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0)
    column = tl.load(columns + row).to(tl.int32)
    mine = ranks + head * 2 * total
    sums = tl.zeros([KEYS], tl.float32)
    for start in range(0, column + 1, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key <= column
        vertical = tl.load(mine + key, mask=inside, other=0)
        slash = tl.load(mine + total + column - key, mask=inside, other=0)
        mass = tl.load(probabilities + (head * rows + row) * total + key, mask=inside, other=0.0)
        sums += tl.where((vertical < 0) | (slash < 0), finite(mass), 0.0)
    tl.store(covered + head * rows + row, tl.sum(sums, 0))


def line_masses(
    probabilities: Tensor,
    columns: Tensor,
    *,
    weights: Tensor | None = None,
    ranks: Tensor | None = None,
    own_rank: bool = False,
    lines: Tensor | None = None,
    slashes_only: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """Return the weighted mass float32 of lines over rows ``[H, r, n]`` at ``columns``.

    Lines are all ``[H, 2 * n]``, all slashes ``[H, n]``, or listed ones int32 ``[H, K]`` (below 0: none). weights ``[H,
    r]``. ranks int32 ``[H, 2 * n]``. own_rank: a line is counted without the cells of lines of lower rank, else without
    those of taken lines only. wanted ``[H]``: heads with 0 or less are not computed and give 0.
    """
    heads, rows, total = probabilities.shape
    count = lines.shape[1] if lines is not None else total if slashes_only else 2 * total
    masses = torch.zeros(heads, count, dtype=torch.float32, device=probabilities.device)
    launch(
        line_masses_kernel,
        (-(-count // _LINES), heads),
        probabilities,
        columns,
        masses if weights is None else weights,
        masses if ranks is None else ranks,
        masses if lines is None else lines,
        masses if wanted is None else wanted,
        masses,
        rows,
        total,
        count,
        total if slashes_only else 0,
        LINES=_LINES,
        ROWS=_ROWS,
        WEIGHED=weights is not None,
        RANKED=ranks is not None,
        OWN_RANK=own_rank,
        LISTED=lines is not None,
        ASKED=wanted is not None,
        num_warps=4,
    )
    return masses


def take_lines(
    probabilities: Tensor, columns: Tensor, weights: Tensor, ranks: Tensor, lines: Tensor, gains: Tensor
) -> None:
    """Correct ``gains`` ``[H, 2 * n]`` in place for taking the listed lines int32 ``[H, K]`` (below 0: none)."""
    heads, rows, total = probabilities.shape
    launch(
        take_lines_kernel,
        (-(-lines.shape[1] // _LINES), heads),
        probabilities,
        columns,
        weights,
        ranks,
        lines,
        gains,
        rows,
        total,
        lines.shape[1],
        LINES=_LINES,
        ROWS=_ROWS,
        num_warps=4,
    )


def covered_masses(probabilities: Tensor, columns: Tensor, ranks: Tensor) -> Tensor:
    """Return the mass ``[H, r]`` of each row on the lines whose rank is ``TAKEN``."""
    heads, rows, total = probabilities.shape
    covered = torch.empty(heads, rows, dtype=torch.float32, device=probabilities.device)
    launch(
        covered_kernel,
        (rows, heads),
        probabilities,
        columns,
        ranks,
        covered,
        rows,
        total,
        KEYS=1024,
        num_warps=4,
    )
    return covered
