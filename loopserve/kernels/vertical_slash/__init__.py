"""Attention of new queries on the exact union of vertical and slash lines, line sets differing per head."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.gpu import limits
from loopserve.kernels.shapes import check, check_lines
from loopserve.kernels.vertical_slash import cpu

_OPERATION = backend.operation(
    "vertical_slash", "torch", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.lines}
)


def vertical_slash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output ``[Hq, Tq, D]``, log-sum-exp float32 ``[Hq, Tq]``) of end-aligned queries over the cells of the chosen
    lines.

    verticals, slashes: bool ``[Hq, Tk]``, by key column and by offset (query column minus key column); a cell on two
    lines counts once. A head with every slash is dense. A row without a cell gives 0 and -inf. ValueError for shapes
    that do not fit.
    """
    check("vertical_slash", queries, keys, values, first_valid=first_valid)
    check_lines("vertical_slash", verticals, slashes, queries.shape[0], keys.shape[1], queries.device)
    found: tuple[Tensor, Tensor] = _OPERATION(
        queries, keys, values, verticals, slashes, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    return found
