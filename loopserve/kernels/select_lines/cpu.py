"""Run the exact greedy selection with the compiled C kernel, one head at a time."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.native.lines import select


def select_lines(
    probabilities: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    tile: int | None,
    row_weights: Tensor,
    row_floor: float,
    most_cost: float,
    forced: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the package."""
    return select(
        columns,
        new_tokens,
        alpha=alpha,
        tile=tile,
        row_weights=row_weights,
        row_floor=row_floor,
        most_cost=most_cost,
        forced=forced,
        probabilities=probabilities,
    )
