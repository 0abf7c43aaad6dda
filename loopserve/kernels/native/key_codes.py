"""Encode keys and compute coded logits with the compiled C kernels."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.library import address, number_type, optional, rows_of

if TYPE_CHECKING:
    from loopserve.kernels.key_codes import KeyCodes


_MOST_CHANNELS = 4096  # the kernels store a key on the stack of a thread


class _KeyCodes(Structure):
    """Mirror the struct ``KeyCodes`` of key_codes.c."""

    _fields_ = [  # ctypes requires a list
        *(
            (name, c_void_p)
            for name in ("queries", "low", "high", "codes", "logits", "base", "chosen", "observed", "counts")
        ),
        *(
            (name, c_int64)
            for name in ("bounds_head", "codes_head", "heads", "rows", "dim", "page", "bits", "columns", "half")
        ),
        *((name, c_int64) for name in ("base_count", "tail", "budget", "least", "threads")),
        ("scaling", c_float),
        ("threshold", c_float),
    ]


def limit(queries: Tensor, of: KeyCodes, *_: object, **__: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    if of.low.dtype not in (torch.float32, torch.bfloat16):
        return f"bounds in {of.low.dtype}"
    return _channels(queries.shape[-1]) or _pages(of.low, of.high, of.codes)


def limit_threshold(queries: Tensor, of: KeyCodes, *_: object, softcap: float | None, **__: object) -> str | None:
    """Return why ``code_threshold`` cannot serve these arguments, or None."""
    return limit(queries, of) if softcap is None else "logits under a softcap"


def limit_pages(
    keys: Tensor, _page: int, _first: int, low: Tensor, high: Tensor, codes: Tensor | None, *_: object
) -> str | None:
    """Return why the kernel cannot summarise these pages, or None."""
    if codes is not None and codes.shape[-1] % 16:
        return f"codes of {codes.shape[-1]} bytes are not a multiple of 16"
    return _channels(keys.shape[-1]) or _pages(low, high, codes)


def _channels(dim: int) -> str | None:
    if dim > _MOST_CHANNELS:
        return f"more than {_MOST_CHANNELS} channels"
    return None if dim % 16 == 0 else f"{dim} channels are not a multiple of 16"


def _pages(low: Tensor, high: Tensor, codes: Tensor | None) -> str | None:
    """Return why the kernel cannot read these buffers, or None.

    It takes one stride for both bounds, and expects the pages of a head contiguous.
    """
    dense = low.stride() == high.stride() and low.stride()[1:] == (low.shape[2], 1)
    if codes is not None:
        dense = dense and codes.stride()[1:] == (codes.shape[2] * codes.shape[3], codes.shape[3], 1)
    return None if dense else "pages that do not lie side by side"


def summarise_pages(
    keys: Tensor, page: int, first: int, low: Tensor, high: Tensor, codes: Tensor | None, bits: int
) -> None:
    """See the operation. The pages of the buffers must be contiguous."""
    keys = rows_of(keys)
    kind, (heads, total, dim) = number_type(keys), keys.shape
    bounds, coded = (heads, low.shape[1], dim), (heads, low.shape[1], page, dim * bits // 8)
    if codes is not None:
        coded = heads, codes.shape[1], *coded[2:]
    library.function("summarise_pages", *[c_void_p] * 4, *[c_int64] * 12)(
        address("keys", keys, kind, (heads, total, dim), strided=2),
        address("low", low, kind, bounds, strided=1, written=True),
        address("high", high, kind, bounds, strided=1, written=True),
        optional("codes", codes, torch.uint8, coded, strided=1, written=True),
        keys.stride(0),
        keys.stride(1),
        low.stride(0),
        0 if codes is None else codes.stride(0),
        heads,
        dim,
        page,
        0 if codes is None else bits,
        first,
        total,
        kind is torch.bfloat16,
        library.threads(),
    )


def code_logits(queries: Tensor, of: KeyCodes, *, scaling: float) -> Tensor:
    """See the operation."""
    call, kept = _call(queries, of, scaling)
    logits = torch.empty(call.heads, call.rows, of.columns, dtype=torch.float32, device="cpu")
    call.logits = address("logits", logits, torch.float32, (call.heads, call.rows, of.columns))
    library.call("code_logits", POINTER(_KeyCodes))(byref(call))
    del kept
    return logits


def code_jumps(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, budget: int, *, scaling: float, observed: Tensor | None
) -> Tensor:
    """See the operation."""
    return _select("code_jumps", queries, of, base, tail, budget, scaling=scaling, observed=observed)


def code_threshold(
    queries: Tensor,
    of: KeyCodes,
    base: Tensor,
    tail: int,
    threshold: float,
    least: int,
    most: int,
    *,
    scaling: float,
    softcap: float | None,
    observed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the operation. The result has the width of the longest head."""
    counts = torch.empty(len(of.low), dtype=torch.long, device="cpu")
    place = address("counts", counts, torch.long, (len(of.low),))
    options: dict[str, Any] = {
        "scaling": scaling,
        "observed": observed,
        "least": least,
        "threshold": threshold,
        "counts": place,
    }
    chosen = _select("code_threshold", queries, of, base, tail, most, **options)
    longest = int(counts.max())
    return chosen[:, chosen.shape[1] - longest :].contiguous(), counts


def _select(
    name: str,
    queries: Tensor,
    of: KeyCodes,
    base: Tensor,
    tail: int,
    budget: int,
    *,
    scaling: float,
    observed: Tensor | None,
    **more: Any,
) -> Tensor:
    """Call a kernel that selects columns: int64 ``[Hkv, S + budget]``. more: further fields of the struct."""
    call, kept = _call(queries, of, scaling)
    base = base.contiguous()
    chosen = torch.empty(call.heads, base.shape[1] + budget, dtype=torch.long, device="cpu")
    call.base, call.base_count = address("base", base, torch.long, (call.heads, base.shape[1])), base.shape[1]
    call.chosen = address("chosen", chosen, torch.long, (call.heads, base.shape[1] + budget))
    call.tail, call.budget = tail, budget
    call.observed = optional("observed", observed, torch.float32, (call.heads, tail))
    for field, value in more.items():
        setattr(call, field, value)
    library.call(name, POINTER(_KeyCodes))(byref(call))
    del kept
    return chosen


def _call(queries: Tensor, of: KeyCodes, scaling: float) -> tuple[_KeyCodes, Tensor]:
    """Return the arguments of the kernel, and the queries they point to, which must stay alive during the call."""
    heads, pages, dim = of.low.shape
    kind, page = number_type(of.low), of.codes.shape[2]
    held = queries.float().contiguous()
    call = _KeyCodes(
        queries=address("queries", held, torch.float32, (*queries.shape[:2], dim)),
        low=address("low", of.low, kind, (heads, pages, dim), strided=1),
        high=address("high", of.high, kind, (heads, pages, dim), strided=1),
        codes=address("codes", of.codes, torch.uint8, (heads, pages, page, dim * of.bits // 8), strided=1),
        bounds_head=of.low.stride(0),
        codes_head=of.codes.stride(0),
        heads=heads,
        rows=queries.shape[0] // heads * queries.shape[1],
        dim=dim,
        page=page,
        bits=of.bits,
        columns=of.columns,
        half=kind is torch.bfloat16,
        threads=library.threads(),
        scaling=scaling,
    )
    return call, held
