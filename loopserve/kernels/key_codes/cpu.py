"""Codes and what follows from them by the compiled kernels."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import rows_of

if TYPE_CHECKING:
    from loopserve.kernels.key_codes.layout import KeyCodes


class _KeyCodes(Structure):
    """``KeyCodes`` of key_codes.c."""

    _fields_ = [  # ctypes wants a plain list
        *((name, c_void_p) for name in ("queries", "low", "high", "codes", "logits", "base", "chosen", "observed")),
        *(
            (name, c_int64)
            for name in ("bounds_head", "codes_head", "heads", "rows", "dim", "page", "bits", "columns", "half")
        ),
        *((name, c_int64) for name in ("base_count", "tail", "budget", "threads")),
        ("scaling", c_float),
    ]


def limit(queries: Tensor, of: KeyCodes, *_: object, **__: object) -> str | None:
    """What it cannot serve."""
    if of.low.dtype not in (torch.float32, torch.bfloat16):
        return f"bounds in {of.low.dtype}"
    return None if queries.shape[-1] % 16 == 0 else f"{queries.shape[-1]} channels are not a multiple of 16"


def limit_pages(
    keys: Tensor, _page: int, _first: int, _low: Tensor, _high: Tensor, codes: Tensor | None, *_: object
) -> str | None:
    """The same for summaries."""
    if codes is not None and codes.shape[-1] % 16:
        return f"codes of {codes.shape[-1]} bytes are not a multiple of 16"
    return None if keys.shape[-1] % 16 == 0 else f"{keys.shape[-1]} channels are not a multiple of 16"


def summarise_pages(
    keys: Tensor, page: int, first: int, low: Tensor, high: Tensor, codes: Tensor | None, bits: int
) -> None:
    """See the package. The buffers' pages must lie side by side."""
    keys = rows_of(keys)
    library.function("summarise_pages", *[c_void_p] * 4, *[c_int64] * 12)(
        keys.data_ptr(),
        low.data_ptr(),
        high.data_ptr(),
        None if codes is None else codes.data_ptr(),
        keys.stride(0),
        keys.stride(1),
        low.stride(0),
        0 if codes is None else codes.stride(0),
        keys.shape[0],
        keys.shape[2],
        page,
        0 if codes is None else bits,
        first,
        keys.shape[1],
        keys.dtype is not torch.float32,
        library.threads(),
    )


def code_logits(queries: Tensor, of: KeyCodes, *, scaling: float) -> Tensor:
    """See the package."""
    call, kept = _call(queries, of, scaling)
    logits = torch.empty(call.heads, call.rows, of.columns)
    call.logits = logits.data_ptr()
    library.call("code_logits", POINTER(_KeyCodes))(byref(call))
    del kept
    return logits


def code_jumps(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, budget: int, *, scaling: float, observed: Tensor | None
) -> Tensor:
    """See the package."""
    call, kept = _call(queries, of, scaling)
    base = base.contiguous()
    chosen = torch.empty(call.heads, base.shape[1] + budget, dtype=torch.long)
    call.base, call.base_count, call.chosen = base.data_ptr(), base.shape[1], chosen.data_ptr()
    call.tail, call.budget = tail, budget
    call.observed = None if observed is None else observed.data_ptr()
    library.call("code_jumps", POINTER(_KeyCodes))(byref(call))
    del kept
    return chosen


def _call(queries: Tensor, of: KeyCodes, scaling: float) -> tuple[_KeyCodes, Tensor]:
    """The call, and the queries it points to, which must live as long."""
    heads, _, dim = of.low.shape
    held = queries.float().contiguous()
    call = _KeyCodes(
        queries=held.data_ptr(),
        low=of.low.data_ptr(),
        high=of.high.data_ptr(),
        codes=of.codes.data_ptr(),
        bounds_head=of.low.stride(0),
        codes_head=of.codes.stride(0),
        heads=heads,
        rows=queries.shape[0] // heads * queries.shape[1],
        dim=dim,
        page=of.codes.shape[2],
        bits=of.bits,
        columns=of.columns,
        half=of.low.dtype is not torch.float32,
        threads=library.threads(),
        scaling=scaling,
    )
    return call, held
