"""Compute dense causal attention: over all keys, in a sliding window, or for queries at arbitrary columns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopserve.kernels import backend
from loopserve.kernels.backend import check
from loopserve.kernels.gpu import limits
from loopserve.kernels.masked import (
    additive_mask,
    fused,
    masked_attention,
    merge,
    per_query_head,
    query_columns,
    serves,
    visible,
)
from loopserve.kernels.native import attention

_OPERATION = backend.operation(
    "dense_attention",
    torch="dense_attention",
    cpu="native.attention",
    triton="gpu.dense_attention",
    limits={"cpu": attention.dense_limit, "triton": limits.attention},
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


def dense_attention_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Define dense attention: all visible cells, one softmax per row. The log-sum-exp has no extra cost here and is always returned."""
    seen = visible(query_columns(queries, keys, columns), keys.shape[1], window=window, first_valid=first_valid)
    mask = per_query_head(seen, queries.shape[0])
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)


_FEW_ROWS = 16  # up to this many rows, one masked call with the group's heads as rows is faster than two calls
_CHUNK = 256  # rows per step where a mask is needed; bounds the size of the mask


def dense_attention_torch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute dense attention with PyTorch's fused kernel, without repeating keys over a group, and masked only where
    necessary.
    """
    if (
        queries.shape[1] == 1
        and columns is None
        and first_valid is None
        and window is None
        and not (softcap or need_lse)
    ):
        return _one_row(queries, keys, values, scaling), None
    if first_valid is not None and bool(first_valid.any()):
        few = queries.shape[1] <= _FEW_ROWS and columns is None and window is None
        if few and serves(values, queries.shape[2], softcap):
            output, lse = _few_rows(queries, keys, values, scaling, first_valid)
            # Masked filler has weight 0: finite values have no effect, others give NaN.
            if not bool(output.isnan().any()):
                return output, lse
        return _ragged(queries, keys, values, scaling, softcap, window, columns, first_valid)
    if columns is not None or softcap or not serves(values, queries.shape[2], softcap):
        return _in_chunks(queries, keys, values, scaling, softcap, window, query_columns(queries, keys, columns))
    rows, total = queries.shape[1], keys.shape[1]
    if window is not None and window < total:
        if rows > 1:
            return _in_chunks(queries, keys, values, scaling, softcap, window, query_columns(queries, keys))
        keys, values = keys[:, -window:], values[:, -window:]
    if rows <= _FEW_ROWS:
        return _few_rows(queries, keys, values, scaling)
    if rows == total:
        output, lse = fused(queries[None], keys[None], values[None], scaling=scaling, causal=True)
        return output[0], lse[0]
    # The fused causal flag assumes a square block. So the history is computed unmasked, the own block causal, and both are merged.
    old, new = slice(None, total - rows), slice(total - rows, None)
    past = fused(queries[None], keys[None, :, old], values[None, :, old], scaling=scaling)
    own = fused(queries[None], keys[None, :, new], values[None, :, new], scaling=scaling, causal=True)
    output, lse = merge(past, own)
    return output[0].to(queries.dtype), lse[0]


def _one_row(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Decode one row through the public function, which has less overhead per call but returns no log-sum-exp."""
    grouped = queries.reshape(1, keys.shape[0], -1, queries.shape[2])
    return scaled_dot_product_attention(grouped, keys[None], values[None], scale=scaling).reshape(
        queries.shape[0], 1, -1
    )


def _few_rows(
    queries: Tensor, keys: Tensor, values: Tensor, scaling: float, first_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the last few rows in one call with the heads of a group as rows, so that the keys are read once."""
    heads, rows, dim = queries.shape
    owners, total, group = keys.shape[0], keys.shape[1], heads // keys.shape[0]
    mask = None
    if rows > 1 or first_valid is not None:
        seen = visible(torch.arange(total - rows, total, device=keys.device), total, first_valid=first_valid)
        mask = torch.zeros(seen.shape, dtype=torch.float32, device=keys.device).masked_fill_(~seen, float("-inf"))
        mask = mask[:, None].expand(-1, group, -1, -1).reshape(1, -1, group * rows, total)
    grouped = queries.reshape(1, owners, group * rows, dim)
    output, lse = fused(grouped, keys[None], values[None], scaling=scaling, mask=mask)
    output, lse = output.reshape(heads, rows, dim), lse.reshape(heads, rows)
    if first_valid is not None and int(first_valid.max()) > total - rows:  # some rows are in the filler
        empty = ~seen.any(-1).repeat_interleave(group, dim=0)
        return output.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))
    return output, lse


def _in_chunks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
    columns: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute rows that need a mask in chunks, each over the columns that it can see."""
    outputs, lses = [], []
    for rows, where in zip(torch.split(queries, _CHUNK, dim=1), torch.split(columns, _CHUNK), strict=True):
        end = int(where.max()) + 1
        start = max(0, int(where.min()) + 1 - window) if window is not None else 0
        part = rows, keys[:, start:end], values[:, start:end]
        seen = visible(where - start, end - start, window=window)
        if serves(values, queries.shape[2], softcap):
            output, lse = fused(*(each[None] for each in part), scaling=scaling, mask=additive_mask(~seen[0]))
            output, lse = output[0], lse[0]
        else:
            output, lse = masked_attention(*part, seen, scaling=scaling, softcap=softcap)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def _ragged(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
    columns: Tensor | None,
    first_valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute one KV head at a time without its filler columns, so that filler is never read."""
    group, rows = queries.shape[0] // keys.shape[0], queries.shape[1]
    output = queries.new_zeros(queries.shape[0], rows, values.shape[2])
    lse = torch.full((queries.shape[0], rows), float("-inf"), dtype=torch.float32, device=queries.device)
    standing = query_columns(queries, keys, columns)
    for head, start in enumerate(first_valid.tolist()):
        sees = (standing >= start).nonzero().flatten()
        if not len(sees):
            continue
        heads, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
        output[heads, sees], found = dense_attention_torch(
            queries[heads, sees],
            keys[own, start:],
            values[own, start:],
            scaling=scaling,
            softcap=softcap,
            window=window,
            columns=None if columns is None else columns[sees] - start,
        )
        assert found is not None
        lse[heads, sees] = found
    return output, lse
