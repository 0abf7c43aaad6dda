"""Dense attention through PyTorch's fused kernel, without repeating keys and without a mask where none is needed."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopserve.kernels.dense_attention import reference
from loopserve.kernels.shapes import query_columns, visible


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
    """See the package. Softcap and log-sum-exp have no fused kernel: the reference serves them."""
    if softcap or need_lse or queries.shape[1] == 0:
        return reference.dense_attention(
            queries,
            keys,
            values,
            scaling=scaling,
            softcap=softcap,
            window=window,
            columns=columns,
            first_valid=first_valid,
            need_lse=need_lse,
        )
    rows, total = queries.shape[1], keys.shape[1]
    if columns is None and first_valid is None and (window is None or window >= total):
        if rows == 1:
            return one_row(queries, keys, values, scaling), None
        if rows == total:
            return _fused(queries, keys, values, scaling, causal=True), None
    mask = visible(query_columns(queries, keys, columns), total, window=window, first_valid=first_valid)
    if mask.dim() == 3:
        mask = mask.repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)[None]
    return _fused(queries, keys, values, scaling, mask=mask).nan_to_num(0.0), None


def one_row(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """One query per head over all keys: the heads of a group are rows of one call, so keys are read once."""
    grouped = queries.view(keys.shape[0], -1, queries.shape[2])
    output = scaled_dot_product_attention(grouped[None], keys[None], values[None], scale=scaling)
    return output[0].view(queries.shape[0], 1, -1)


def _fused(
    queries: Tensor, keys: Tensor, values: Tensor, scaling: float, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    output = scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=queries.shape[0] != keys.shape[0],
    )
    return output[0]
