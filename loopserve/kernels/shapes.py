"""Check shapes, dtypes and devices before an operation dispatches.

Compiled kernels read memory by address. So every argument that could lead to a wrong read (shape, dtype, device, index
range) is rejected here.
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
    """Raise ValueError unless queries ``[Hq, Tq, D]``, keys ``[Hkv, Tk, D]`` and values ``[Hkv, Tk, Dv]`` fit together.

    Without ``columns`` the queries are the last Tq columns, so Tq must not exceed Tk.
    """
    rows, held = queries.shape, keys.shape
    if len(rows) != 3 or len(held) != 3 or 0 in rows or 0 in held:
        raise ValueError(f"{op}: {_both(queries, keys)} must be non-empty [Hq, Tq, D] and [Hkv, Tk, D]")
    if rows[2] != held[2] or rows[0] % held[0]:
        raise ValueError(f"{op}: {_both(queries, keys)} do not fit: D must agree and Hkv divide Hq")
    if values is not None and (values.dim() != 3 or values.shape[:2] != held[:2]):
        raise ValueError(f"{op}: values {list(values.shape)} do not fit keys {list(held)}")
    kind, device = queries.dtype, queries.device
    for name, other in (("keys", keys), ("values", values)):
        if other is not None and (other.dtype is not kind or other.device != device):
            raise ValueError(f"{op}: queries are {kind} on {device}, {name} {other.dtype} on {other.device}")
    if columns is not None:
        check_columns(op, columns, rows[1], held[1], device)
    elif rows[1] > held[1]:
        raise ValueError(f"{op}: {rows[1]} queries cannot be the last of {held[1]} keys")
    if first_valid is not None:
        check_first_valid(op, first_valid, keys)


def _both(queries: Tensor, keys: Tensor) -> str:
    return f"queries {list(queries.shape)} and keys {list(keys.shape)}"


def check_columns(op: str, columns: Tensor, rows: int, total: int, device: torch.device) -> None:
    """Raise ValueError unless ``columns`` are int64 ``[rows]`` in ``[0, total)`` on this device."""
    if columns.shape != (rows,) or columns.dtype != torch.long:
        raise ValueError(f"{op}: {rows} rows need int64 columns [{rows}], got {columns.dtype} {list(columns.shape)}")
    check_device(op, "columns", columns, device)
    # Reading a value synchronises with an accelerator. So on a GPU the caller must ensure the range.
    if columns.device.type == "cpu":
        check_range(f"{op}: columns", columns, total)


def check_first_valid(op: str, first_valid: Tensor, of: Tensor) -> None:
    """Raise ValueError unless ``first_valid`` is int64 ``[H]`` beside ``of`` ``[H, n, ...]``, from 0 to n."""
    if first_valid.shape != of.shape[:1] or first_valid.dtype != torch.long:
        raise ValueError(
            f"{op}: first_valid {first_valid.dtype} {list(first_valid.shape)} must be int64 [{of.shape[0]}]"
        )
    check_device(op, "first_valid", first_valid, of.device)
    if first_valid.device.type == "cpu":
        check_range(f"{op}: first_valid", first_valid, of.shape[1] + 1)


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless a tensor is on the device of the others."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} are on {tensor.device}, the rest is on {device}")


def check_range(what: str, indices: Tensor, total: int, lowest: int = 0) -> None:
    """Raise ValueError unless all indices lie in ``[lowest, total)``."""
    if indices.numel() == 0:
        return
    low, high = (int(each) for each in indices.aminmax())
    if low < lowest or high >= total:
        raise ValueError(f"{what} must lie in [{lowest}, {total}), got {low} to {high}")


def check_lines(op: str, verticals: Tensor, slashes: Tensor, heads: int, total: int, device: torch.device) -> None:
    """Raise ValueError unless both are bool ``[heads, total]`` on this device."""
    for name, lines in (("verticals", verticals), ("slashes", slashes)):
        check_flags(op, name, lines, (heads, total), device)


def check_flags(op: str, name: str, flags: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless ``flags`` are bool of this shape on this device."""
    if flags.shape != shape or flags.dtype != torch.bool:
        raise ValueError(f"{op}: {name} must be bool {list(shape)}, got {flags.dtype} {list(flags.shape)}")
    check_device(op, name, flags, device)
