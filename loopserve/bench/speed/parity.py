"""Verify each operation against its reference on the timed tensors, on sampled rows where all would take too long.

A row of attention equals the reference's result for that query as the newest of the keys before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.bench.heads import Heads
from loopserve.core.policy.patterns import TILE, BlockPattern, LinePattern
from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.vertical_slash import vertical_slash

# Largest relative error of a sampled row, and of all of them together. Rounding of inputs is not counted, since the
# reference gets the same rounded tensors in float64.
TOLERANCES = {torch.float32: (2e-3, 2e-4), torch.float16: (2e-2, 5e-3), torch.bfloat16: (8e-2, 2e-2)}
_WINDOWS, _ROWS = 8, 4  # stretches of rows that are checked, and rows of each


@dataclass(frozen=True)
class Verdict:
    """Hold errors of an operation. worst: largest relative error of a row. error (``rel_err_pattern``): of all rows together.

    rel_err: against dense attention in float64, None where it is not defined.
    """

    worst: float
    error: float
    rel_err: float | None
    ok: bool
    why: str = ""


def verdict(
    found: Tensor, exact: Tensor, dense: Tensor | None, dtype: torch.dtype, truth: Tensor | None = None
) -> Verdict:
    """Compare ``[..., rows, D]`` with its reference; ``truth`` replaces ``found`` in the comparison with dense."""
    worst_allowed, error_allowed = TOLERANCES[dtype]
    found, exact = found.double(), exact.double()
    finite = bool(found.isfinite().all())
    scale = exact.norm(dim=-1).clamp(min=1e-3 * float(exact.norm(dim=-1).mean()) + 1e-30)
    worst = float(((found - exact).norm(dim=-1) / scale).max()) if finite else float("inf")
    error = relative(found, exact) if finite else float("inf")
    ok = worst <= worst_allowed and error <= error_allowed
    why = (
        "" if ok else f"worst row {worst:.1e} (allowed {worst_allowed:.0e}), all rows {error:.1e} ({error_allowed:.0e})"
    )
    return Verdict(worst, error, None if dense is None else relative(found, dense), ok, why)


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the exact result."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def sampled_rows(new_tokens: int, tile: int = TILE) -> list[tuple[int, int]]:
    """Return stretches of rows to check: the first and last rows, and rows on both sides of tile edges between them."""
    if new_tokens <= _WINDOWS * _ROWS:
        return [(0, new_tokens)]
    edges = [round(step * (new_tokens - _ROWS) / (_WINDOWS - 1)) for step in range(_WINDOWS)]
    inner = [max(edge // tile * tile - _ROWS // 2, 0) for edge in edges[1:-1]]
    return [(start, start + _ROWS) for start in sorted({0, *inner, new_tokens - _ROWS})]


def rows_of(output: Tensor, stretches: list[tuple[int, int]]) -> Tensor:
    return torch.cat([output[:, start:stop] for start, stop in stretches], dim=1)


def by_reference(
    heads: Heads, stretches: list[tuple[int, int]], attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """Return rows ``[Hq, rows, D]`` in float64 by the reference: ``attend(queries, keys, values, stop)`` on cut tensors."""
    double = heads.to(torch.float64)
    parts = []
    with backend.use("reference"):
        for start, stop in stretches:
            end = heads.history + stop
            parts.append(attend(double.queries[:, start:stop], double.keys[:, :end], double.values[:, :end], end))
    return torch.cat(parts, dim=1)


def exact_dense(heads: Heads, stretches: list[tuple[int, int]]) -> Tensor:
    """Return dense attention of the sampled rows, float64 ``[Hq, rows, D]``."""
    return by_reference(heads, stretches, lambda q, k, v, _: dense_attention(q, k, v, scaling=heads.scaling)[0])


def exact_lines(heads: Heads, pattern: LinePattern, stretches: list[tuple[int, int]]) -> Tensor:
    """Return attention of the sampled rows under a pattern of lines, float64 ``[Hq, rows, D]``."""
    return by_reference(
        heads,
        stretches,
        lambda q, k, v, end: vertical_slash(
            q, k, v, pattern.verticals[:, :end], pattern.slashes[:, :end], scaling=heads.scaling
        )[0],
    )


def exact_blocks(heads: Heads, pattern: BlockPattern, tiles: list[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return whole query tiles under a pattern of blocks, and their stretches of rows."""
    side, new = pattern.tile, pattern.new_tokens
    stretches = [(tile * side, min((tile + 1) * side, new)) for tile in tiles]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
        row = (end - heads.history - 1) // side
        blocks = pattern.blocks[:, row : row + 1, : -(-end // side)]
        return block_sparse(queries, keys, values, blocks, tile=side, scaling=heads.scaling)[0]

    return by_reference(heads, stretches, attend), stretches
