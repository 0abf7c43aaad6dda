"""Select the lines of each head that cover a share of its attention at the lowest cost, greedily by uncovered mass per
cost.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check_columns, check_device, check_lines
from loopserve.kernels.gpu import limits

Cost = Literal["length", "tile"]
TILE = 64  # rows per tile of the kernels whose work the cost ``tile`` counts
MOST_TILE = 256
_OPERATION = backend.operation(
    "select_lines",
    reference="select_lines.reference",
    torch="select_lines.rounds",
    cpu="native.scores",
    triton="gpu.select_lines",
    any_device=True,
    limits={"triton": limits.selection},
)


class LineSelection(NamedTuple):
    """Hold the chosen lines of each head and their coverage of the sampled rows.

    verticals, slashes: bool ``[Hq, n]``. coverage ``[Hq]``: weighted share of the rows' mass on the union. row_coverage
    ``[Hq, r]``: share of each row's mass. cost ``[Hq]``: cells of the union (``length``), or keys computed per tile,
    averaged over the block (``tile``).
    """

    verticals: Tensor
    slashes: Tensor
    coverage: Tensor
    row_coverage: Tensor
    cost: Tensor


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
    tile: int = TILE,
    most_cost: float = math.inf,
    least_weight: float = 0.0,
) -> LineSelection:
    """Return lines whose union covers at least ``alpha`` of the weighted mass of the sampled rows, per head.

    probabilities float32 ``[Hq, r, n]``: softmax rows of queries at ``columns`` int64 ``[r]``. The block is the last
    ``new_tokens`` of n columns. Probabilities that are not finite count as 0.

    cost ``length``: the cells of the block that a line adds to the union. cost ``tile``: the additional keys that a
    kernel with tiles of ``tile`` rows computes. A vertical costs 1, an isolated slash ``tile``, a slash next to a
    chosen one 1, and less where a line crosses only part of the block.

    row_weights ``[r]`` or ``[Hq, r]``: weight of each row's mass. row_floor: share that every sampled row must reach in
    addition. forced_verticals, forced_slashes ``[n]`` or ``[Hq, n]``: lines taken first. most_cost: a head stops below
    its target as soon as the rate of its best line shows that the target would cost more. least_weight: a head stops
    below its target where the best line holds less mass than this per cell that it adds, mean over the rows under
    their weights; with cost ``tile`` a cell that a kernel computes in addition counts, on a line or not. It does not
    hold for ``row_floor``. On a GPU stopping saves no time, since all heads run the same rounds.

    Raises ValueError for arguments out of range or that do not fit together.
    """
    if probabilities.dim() != 3 or 0 in probabilities.shape:
        raise ValueError(f"select_lines: probabilities {list(probabilities.shape)} must be non-empty [Hq, r, n]")
    heads, rows, total = probabilities.shape
    check_columns("select_lines", columns, rows, total, probabilities.device)
    options = prepare(
        "select_lines",
        columns,
        heads,
        total,
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
    chosen, covered, mass, spent = _OPERATION(probabilities, columns, new_tokens, **options)
    return finish(chosen, covered, mass, spent, options["row_weights"])


def prepare(
    op: str,
    columns: Tensor,
    heads: int,
    total: int,
    new_tokens: int,
    *,
    alpha: float,
    cost: str,
    row_weights: Tensor | None,
    row_floor: float | None,
    forced: tuple[Tensor | None, Tensor | None],
    tile: int,
    most_cost: float,
    least_weight: float,
) -> dict[str, Any]:
    """Check the options and return them as an implementation takes them: weights ``[Hq, r]``, forced lines ``[Hq, 2,
    n]``.

    The columns are checked elsewhere. Raises ValueError for options out of range or that do not fit together.
    """
    rows, device = len(columns), columns.device
    if not 0 < new_tokens <= total:
        raise ValueError(f"{op}: new_tokens={new_tokens} must lie in [1, {total}]")
    if not 0.0 <= alpha <= 1.0 or not 0.0 <= (row_floor or 0.0) <= 1.0:
        raise ValueError(f"{op}: alpha={alpha} and row_floor={row_floor} must lie in [0, 1]")
    if not 0.0 <= least_weight < math.inf:
        raise ValueError(f"{op}: least_weight={least_weight} must be 0 or more, and finite")
    if cost not in ("length", "tile") or not 1 <= tile <= MOST_TILE:
        raise ValueError(f"{op}: cost={cost!r} must be 'length' or 'tile', tile={tile} from 1 to {MOST_TILE}")
    weights = torch.ones(heads, rows, dtype=torch.float32, device=device) if row_weights is None else row_weights
    check_device(op, "row_weights", weights, device)
    fits = weights.shape in ((rows,), (heads, rows))
    # Reading a value synchronises with an accelerator. So on a GPU the caller must ensure the values.
    if not fits or (device.type == "cpu" and not bool(((weights >= 0) & (weights < math.inf)).all())):
        raise ValueError(
            f"{op}: row_weights {list(weights.shape)} must be [{rows}] or [{heads}, {rows}], finite and none negative"
        )
    lines = torch.zeros(heads, 2, total, dtype=torch.bool, device=device)
    for kind, each in enumerate(forced):
        if each is not None:
            check_lines(f"{op} (forced)", each.expand(heads, -1), each.expand(heads, -1), heads, total, device)
            lines[:, kind] = each
    return {
        "alpha": alpha,
        "tile": tile if cost == "tile" else None,
        "row_weights": weights.expand(heads, -1),
        "row_floor": row_floor or 0.0,
        "most_cost": most_cost,
        "least_weight": least_weight,
        "forced": lines,
    }


def finish(chosen: Tensor, covered: Tensor, mass: Tensor, spent: Tensor, weights: Tensor) -> LineSelection:
    """Return the result of an implementation (lines ``[Hq, 2, n]``, masses ``[Hq, r]``, cost ``[Hq]``) with masses as
    shares.
    """
    weights = weights.to(covered.dtype)
    return LineSelection(
        verticals=chosen[:, 0],
        slashes=chosen[:, 1],
        coverage=_share((covered * weights).sum(-1), (mass * weights).sum(-1)).float(),
        row_coverage=_share(covered, mass).float(),
        cost=spent.float(),
    )


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Divide part by whole; a share of nothing is 1."""
    return (part / whole.clamp(min=1e-30)).masked_fill(whole <= 0, 1.0).clamp(max=1.0)
