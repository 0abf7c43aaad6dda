"""Compute how much attention each stored pair gets from a few queries, per KV head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.gpu import limits
from loopserve.kernels.shapes import check
from loopserve.kernels.token_scores import cpu

OverRows = Literal["mean", "sum", "max"]
_OVER_ROWS = ("mean", "sum", "max")
_OPERATION = backend.operation(
    "token_scores", "torch", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.scores}
)


def token_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    over_rows: OverRows | str = "mean",
) -> Tensor:
    """Return the softmax of queries ``[Hq, r, D]`` at ``columns`` over all keys, reduced over rows and averaged over
    the group: float32 ``[Hkv, n]``.

    over_rows: ``mean``, ``sum`` or ``max`` over the rows of each query head. Raises ValueError for an unknown name or
    arguments that do not fit together.
    """
    check("token_scores", queries, keys, columns=columns, first_valid=first_valid)
    if over_rows not in _OVER_ROWS:
        raise ValueError(f"token_scores: over_rows={over_rows!r} is unknown (known: {', '.join(_OVER_ROWS)})")
    found: Tensor = _OPERATION(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid, over_rows=over_rows
    )
    return found
