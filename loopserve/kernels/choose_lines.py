"""Select the vertical and slash lines of each head from the attention of sampled rows: ``line_scores`` and
``select_lines`` in one call.

It is an operation of its own because the rows of all heads are large (heads x rows x keys). A compiled kernel processes
one head at a time, so that the rows of a head stay in the cache.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check
from loopserve.kernels.gpu import limits
from loopserve.kernels.line_scores import row_probabilities_reference, row_probabilities_torch
from loopserve.kernels.native import scores
from loopserve.kernels.select_lines import TILE, Cost, LineSelection, finish, prepare
from loopserve.kernels.select_lines.reference import select_lines_reference
from loopserve.kernels.select_lines.rounds import select_lines_torch

_OPERATION = backend.operation(
    "choose_lines",
    torch="choose_lines",
    cpu="native.scores",
    triton="gpu.select_lines",
    limits={"cpu": scores.limit, "triton": limits.choice},
)


def choose_lines(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    scaling: float,
    alpha: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    cost: Cost = "length",
    row_weights: Tensor | None = None,
    row_floor: float | None = None,
    forced_verticals: Tensor | None = None,
    forced_slashes: Tensor | None = None,
    tile: int = TILE,
    most_cost: float = math.inf,
    least_weight: float = 0.0,
) -> LineSelection:
    """Return lines that cover a share ``alpha`` of the attention of queries ``[Hq, r, D]`` at ``columns`` over keys
    ``[Hkv, n, D]``.

    Options and errors are those of ``line_scores`` and ``select_lines``.
    """
    check("choose_lines", queries, keys, columns=columns, first_valid=first_valid)
    options = prepare(
        "choose_lines",
        columns,
        queries.shape[0],
        keys.shape[1],
        new_tokens,
        alpha=alpha,
        cost=cost,
        row_weights=row_weights,
        row_floor=row_floor,
        forced=(forced_verticals, forced_slashes),
        tile=tile,
        most_cost=most_cost,
        least_weight=least_weight,
    )
    chosen, covered, mass, spent = _OPERATION(
        queries, keys, columns, new_tokens, scaling=scaling, softcap=softcap, first_valid=first_valid, **options
    )
    return finish(chosen, covered, mass, spent, options["row_weights"])


def choose_lines_reference(
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
    """Score the lines, then select.

    Returns chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``.
    """
    rows = row_probabilities_reference(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    return select_lines_reference(rows, columns, new_tokens, **options)


def choose_lines_torch(
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
    """Do the same with the faster parts."""
    rows = row_probabilities_torch(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    return select_lines_torch(rows, columns, new_tokens, **options)
