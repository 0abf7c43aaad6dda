"""Which lines of each head hold a wanted share of its attention at the lowest cost: greedy by gain per cost, overlap counted out."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.select_lines import cpu, reference

Cost = Literal["length", "tile"]


class LineSelection(NamedTuple):
    """verticals, slashes: bool ``[Hq, n]``. coverage ``[Hq]``: weighted share of the sampled rows' mass on their union."""

    verticals: Tensor
    slashes: Tensor
    coverage: Tensor


_OPERATION = backend.operation("select_lines", reference=reference.select_lines, cpu=cpu.select_lines)


def select_lines(
    probabilities: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    cost: Cost = "length",
    row_weights: Tensor | None = None,
    row_floor: float | None = None,
    forced_verticals: Tensor | None = None,
    forced_slashes: Tensor | None = None,
) -> LineSelection:
    """Lines whose union holds at least ``alpha`` of the (weighted) mass of the sampled rows, per head.

    probabilities float32 ``[Hq, r, n]``: softmax rows standing at ``columns`` ``[r]`` among the last ``new_tokens`` of n columns.
    cost ``length``: cells of the block a line adds to the union. ``tile``: keys a kernel of 64-row tiles computes for it, so a slash
    next to a chosen one is nearly free and an isolated one costs 64. row_weights ``[r]``; row_floor: every sampled row must also
    reach this share. forced lines ``[Hq, n]`` are taken first. ValueError for shapes or values that make no sense.
    """
    heads, rows, total = probabilities.shape
    if columns.shape != (rows,) or not 0 < new_tokens <= total:
        raise ValueError(
            f"select_lines: {rows} rows at columns {list(columns.shape)}, {new_tokens} new of {total} tokens"
        )
    if not 0.0 <= alpha <= 1.0 or cost not in ("length", "tile"):
        raise ValueError(f"select_lines: alpha={alpha} must lie in [0, 1] and cost={cost!r} be 'length' or 'tile'")
    none = torch.zeros(heads, total, dtype=torch.bool, device=probabilities.device)
    weights = torch.ones(rows) if row_weights is None else row_weights
    return LineSelection(
        *_OPERATION.pick(probabilities)(
            probabilities,
            columns,
            new_tokens,
            alpha=alpha,
            cost=cost,
            row_weights=weights.to(probabilities),
            row_floor=row_floor or 0.0,
            forced_verticals=none if forced_verticals is None else forced_verticals,
            forced_slashes=none if forced_slashes is None else forced_slashes,
        )
    )
