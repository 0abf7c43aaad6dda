"""Compute line masses on a GPU.

One kernel computes the rows and their sums per column, another the diagonals. Neither uses atomics, so equal inputs
give equal bits.
"""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.gpu.lines import line_masses
from loopserve.kernels.gpu.rows import row_masses


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    rows, vertical = row_masses(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid, writes=True
    )
    return rows, vertical, line_masses(rows, columns, slashes_only=True)
