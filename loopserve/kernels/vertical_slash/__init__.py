"""Compute attention of new queries on the exact union of vertical and slash lines, which differ per head."""

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
    """Return output ``[Hq, Tq, D]`` and log-sum-exp float32 ``[Hq, Tq]`` over the cells of the chosen lines.

    The queries are the last Tq columns. verticals, slashes: bool ``[Hq, Tk]``, by key column and by offset (query
    column minus key column). A cell on two lines counts once. A head with every slash is dense. A row without a cell
    gets output 0 and log-sum-exp -inf. Raises ValueError for arguments that do not fit together.
    """
    check("vertical_slash", queries, keys, values, first_valid=first_valid)
    check_lines("vertical_slash", verticals, slashes, queries.shape[0], keys.shape[1], queries.device)
    found: tuple[Tensor, Tensor] = _OPERATION(
        queries, keys, values, verticals, slashes, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    return found
