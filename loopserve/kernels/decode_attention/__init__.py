"""Attention of the newest few queries over an active set whose heads may hold different numbers of pairs."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.gpu import limits
from loopserve.kernels.shapes import check

_OPERATION = backend.operation("decode_attention", "packed", "triton", limits={"triton": limits.attention})


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(output ``[Hq, t, D]``, log-sum-exp float32 ``[Hq, t]`` if asked for) of queries ``[Hq, t, D]`` over ``[Hkv, S,
    D]``.

    The last t columns are the queries' own tokens, causal among themselves. first_valid ``[Hkv]``: columns before it
    are filler of heads that keep fewer pairs. ValueError for shapes that do not fit.
    """
    check("decode_attention", queries, keys, values, first_valid=first_valid)
    output, lse = _OPERATION(
        queries, keys, values, scaling=scaling, softcap=softcap, first_valid=first_valid, need_lse=need_lse
    )
    return output, lse if need_lse else None
