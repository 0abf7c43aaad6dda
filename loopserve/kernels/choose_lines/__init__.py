"""Select the vertical and slash lines of each head from the attention of sampled rows: ``line_scores`` and
``select_lines`` in one call.

It is an operation of its own because the rows of all heads are large (heads x rows x keys). A compiled kernel processes
one head at a time, so that the rows of a head stay in the cache.
"""

from __future__ import annotations

import math

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.choose_lines import cpu
from loopserve.kernels.gpu import limits
from loopserve.kernels.select_lines.options import TILE, Cost, LineSelection, finish, prepare
from loopserve.kernels.shapes import check

_OPERATION = backend.operation(
    "choose_lines", "torch", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.choice}
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
    )
    chosen, covered, mass, spent = _OPERATION(
        queries, keys, columns, new_tokens, scaling=scaling, softcap=softcap, first_valid=first_valid, **options
    )
    return finish(chosen, covered, mass, spent, options["row_weights"])
