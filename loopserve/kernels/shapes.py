"""Checks that every operation makes first, and the mask they share."""

from __future__ import annotations

import torch
from torch import Tensor


def check(op: str, queries: Tensor, keys: Tensor, values: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Raise ValueError unless the shapes fit together."""
    if queries.dim() != 3 or keys.dim() != 3:
        raise ValueError(
            f"{op}: queries {list(queries.shape)} and keys {list(keys.shape)} must be [Hq, Tq, D] and [Hkv, Tk, D]"
        )
    if queries.shape[2] != keys.shape[2] or queries.shape[0] % max(keys.shape[0], 1):
        raise ValueError(f"{op}: queries {list(queries.shape)} do not fit keys {list(keys.shape)}")
    if values is not None and values.shape[:2] != keys.shape[:2]:
        raise ValueError(f"{op}: values {list(values.shape)} do not fit keys {list(keys.shape)}")
    if queries.device != keys.device:
        raise ValueError(f"{op}: queries are on {queries.device}, keys on {keys.device}")
    if columns is None and queries.shape[1] > keys.shape[1]:
        raise ValueError(f"{op}: {queries.shape[1]} queries cannot be the last of {keys.shape[1]} keys")
    if columns is not None and columns.shape != (queries.shape[1],):
        raise ValueError(f"{op}: {queries.shape[1]} queries need as many columns, got {list(columns.shape)}")


def query_columns(queries: Tensor, keys: Tensor, columns: Tensor | None) -> Tensor:
    """Where the queries stand: the given columns, or the last ones."""
    if columns is not None:
        return columns
    return torch.arange(keys.shape[1] - queries.shape[1], keys.shape[1], device=keys.device)


def visible(columns: Tensor, keys: int, *, window: int | None = None, first_valid: Tensor | None = None) -> Tensor:
    """Which keys a query may see: bool ``[Tq, Tk]``, or ``[Hkv, Tq, Tk]`` where heads hold filler columns."""
    key = torch.arange(keys, device=columns.device)
    mask = key <= columns[:, None]
    if window is not None:
        mask &= key > columns[:, None] - window
    if first_valid is not None:
        mask = mask & (key >= first_valid[:, None, None])
    return mask


def scores(queries: Tensor, keys: Tensor, *, scaling: float, softcap: float | None) -> Tensor:
    """Scaled scores ``[Hkv, group, Tq, Tk]`` in float32 (float64 stays), keys not repeated over the group."""
    kind = torch.promote_types(queries.dtype, torch.float32)
    grouped = queries.to(kind).unflatten(0, (keys.shape[0], -1))
    found = grouped @ keys.to(kind).transpose(1, 2)[:, None] * scaling
    return softcap * torch.tanh(found / softcap) if softcap else found
