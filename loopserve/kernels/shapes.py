"""The check every operation makes before it dispatches: one clear error instead of a wrong answer or a crash further
down.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(
    op: str,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
) -> None:
    """Raise ValueError unless the tensors fit together: queries ``[Hq, Tq, D]``, keys ``[Hkv, Tk, D]``, values ``[Hkv,
    Tk, Dv]``.

    Without ``columns`` the queries are the last of the keys, so they cannot be more.
    """
    if queries.dim() != 3 or keys.dim() != 3 or 0 in queries.shape or 0 in keys.shape:
        raise ValueError(f"{op}: {_both(queries, keys)} must be non-empty [Hq, Tq, D] and [Hkv, Tk, D]")
    if queries.shape[2] != keys.shape[2] or queries.shape[0] % keys.shape[0]:
        raise ValueError(f"{op}: {_both(queries, keys)} do not fit: D must agree and Hkv divide Hq")
    if values is not None and (values.dim() != 3 or values.shape[:2] != keys.shape[:2]):
        raise ValueError(f"{op}: values {list(values.shape)} do not fit keys {list(keys.shape)}")
    for name, other in (("keys", keys), ("values", values)):
        if other is not None and (other.dtype != queries.dtype or other.device != queries.device):
            raise ValueError(
                f"{op}: queries are {queries.dtype} on {queries.device}, {name} {other.dtype} on {other.device}"
            )
    if columns is None:
        if queries.shape[1] > keys.shape[1]:
            raise ValueError(f"{op}: {queries.shape[1]} queries cannot be the last of {keys.shape[1]} keys")
    else:
        check_columns(op, columns, queries.shape[1], keys.shape[1])
    if first_valid is not None and first_valid.shape != keys.shape[:1]:
        raise ValueError(f"{op}: first_valid {list(first_valid.shape)} must be [{keys.shape[0]}]")


def _both(queries: Tensor, keys: Tensor) -> str:
    return f"queries {list(queries.shape)} and keys {list(keys.shape)}"


def check_columns(op: str, columns: Tensor, rows: int, total: int) -> None:
    """Raise ValueError unless ``columns`` are int64 ``[rows]`` in ``[0, total)``."""
    if columns.shape != (rows,) or columns.dtype != torch.long:
        raise ValueError(f"{op}: {rows} rows need int64 columns [{rows}], got {columns.dtype} {list(columns.shape)}")
    # Reading a value waits for an accelerator, so there the range is the caller's business.
    if columns.device.type == "cpu":
        check_range(f"{op}: columns", columns, total)


def check_range(what: str, indices: Tensor, total: int) -> None:
    """Raise ValueError unless all indices lie in ``[0, total)``."""
    if indices.numel() == 0:
        return
    low, high = (int(each) for each in indices.aminmax())
    if low < 0 or high >= total:
        raise ValueError(f"{what} must lie in [0, {total}), got {low} to {high}")


def check_lines(op: str, verticals: Tensor, slashes: Tensor, heads: int, total: int) -> None:
    """Raise ValueError unless both are bool ``[heads, total]``."""
    for name, lines in (("verticals", verticals), ("slashes", slashes)):
        if lines.shape != (heads, total) or lines.dtype != torch.bool:
            raise ValueError(f"{op}: {name} must be bool [{heads}, {total}], got {lines.dtype} {list(lines.shape)}")
