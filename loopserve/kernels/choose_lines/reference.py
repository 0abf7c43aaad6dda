"""Score the lines, then select."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loopserve.kernels.line_scores.reference import row_probabilities
from loopserve.kernels.select_lines.reference import select_lines


def choose_lines(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``.

    See the package.
    """
    rows = row_probabilities(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    return select_lines(rows, columns, new_tokens, **options)
