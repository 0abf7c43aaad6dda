"""Dense causal attention: over everything, a sliding window, or for rows that stand anywhere."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.dense_attention import cpu
from loopserve.kernels.gpu import limits
from loopserve.kernels.shapes import check

_OPERATION = backend.operation(
    "dense_attention", "torch", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.attention}
)


def dense_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(output ``[Hq, Tq, D]``, log-sum-exp of the scores float32 ``[Hq, Tq]`` if asked for). An empty row gives 0 and
    -inf.

    columns int64 ``[Tq]``: where the queries stand (None = the last ones). window: a query sees its own column and the
    window - 1 before it. first_valid ``[Hkv]``: columns before it are filler. ValueError for shapes that do not fit.
    """
    check("dense_attention", queries, keys, values, columns=columns, first_valid=first_valid)
    if window is not None and window < 1:
        raise ValueError(f"dense_attention: window={window} must be at least 1")
    output, lse = _OPERATION(
        queries,
        keys,
        values,
        scaling=scaling,
        softcap=softcap,
        # A number that an int64 has no room for would wrap round in C.
        window=None if window is None else min(window, keys.shape[1]),
        columns=columns,
        first_valid=first_valid,
        need_lse=need_lse,
    )
    return output, lse if need_lse else None
