"""How much attention each stored pair gets from a few queries, per KV head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.shapes import check
from loopserve.kernels.token_scores import reference

OverRows = Literal["mean", "sum", "max"]
_OPERATION = backend.operation("token_scores", reference=reference.token_scores)


def token_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    over_rows: OverRows = "mean",
) -> Tensor:
    """Row-softmax of queries ``[Hq, r, D]`` over keys, joined over the rows per query head, mean over the group: ``[Hkv, n]``."""
    check("token_scores", queries, keys, columns=columns)
    if over_rows not in ("mean", "sum", "max"):
        raise ValueError(f"token_scores: over_rows={over_rows!r} is unknown (known: mean, sum, max)")
    found: Tensor = _OPERATION.pick(queries)(
        queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid, over_rows=over_rows
    )
    return found
