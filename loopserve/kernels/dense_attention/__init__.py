"""Compute dense causal attention: over all keys, in a sliding window, or for queries at arbitrary columns."""

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
    """Return output ``[Hq, Tq, D]`` and, with ``need_lse``, the log-sum-exp of the scores float32 ``[Hq, Tq]``.

    columns int64 ``[Tq]``: columns of the queries; None: the last Tq. window: a query sees its own column and the
    window - 1 before it. first_valid ``[Hkv]``: columns before it are filler. A row that sees no key gets output 0 and
    log-sum-exp -inf. Raises ValueError for arguments that do not fit together.
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
        # Clamping keeps the window within an int64 of the C kernel.
        window=None if window is None else min(window, keys.shape[1]),
        columns=columns,
        first_valid=first_valid,
        need_lse=need_lse,
    )
    return output, lse if need_lse else None
