"""Encode keys and compute coded logits with the compiled C kernels."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p, sizeof
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.library import address, fresh, number_type, optional, rows_address, rows_of

if TYPE_CHECKING:
    from loopserve.kernels.choose_columns import ColumnChoice
    from loopserve.kernels.key_codes import KeyCodes


_MOST_CHANNELS = 4096  # the kernels store a key on the stack of a thread


class _KeyCodes(Structure):
    """Mirror the struct ``KeyCodes`` of code_pages.h."""

    _fields_ = [  # ctypes requires a list
        *(
            (name, c_void_p)
            for name in ("queries", "keys", "low", "high", "codes", "logits", "base", "chosen", "observed", "counts")
        ),
        *(
            (name, c_int64)
            for name in ("query_head", "query_row", "key_head", "key_row", "bounds_head", "codes_head", "heads")
        ),
        *((name, c_int64) for name in ("group", "tokens", "dim", "page", "bits", "columns", "first", "half")),
        *((name, c_int64) for name in ("query_half", "base_count", "tail", "budget", "least", "relative", "threads")),
        ("scaling", c_float),
        ("threshold", c_float),
    ]


_PACKED = Struct("10P22q2f")  # the same fields; a struct format fills them in one call
assert _PACKED.size == sizeof(_KeyCodes)


def limit(queries: Tensor, of: KeyCodes, *_: object, **__: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    if of.low.dtype not in (torch.float32, torch.bfloat16):
        return f"bounds in {of.low.dtype}"
    return _channels(queries.shape[-1]) or _pages(of.low, of.high, of.codes)


def limit_threshold(queries: Tensor, of: KeyCodes, *_: object, softcap: float | None, **__: object) -> str | None:
    """Return why ``code_threshold`` cannot serve these arguments, or None."""
    return limit(queries, of) if softcap is None else "logits under a softcap"


def limit_choices(_: Tensor, choices: Sequence[ColumnChoice], *, softcap: float | None, **__: object) -> str | None:
    """Return why ``choose_columns`` cannot serve these arguments, or None."""
    for each in choices:
        problem = limit(each.queries, each.of)
        if problem is None and each.keys is not None and each.of.codes.shape[-1] % 16:
            problem = _sixteens(each.of.codes)
        if problem is not None:
            return problem
    capped = softcap is not None and any(each.threshold is not None for each in choices)
    return "logits under a softcap" if capped else None


def limit_pages(
    keys: Tensor, _page: int, _first: int, low: Tensor, high: Tensor, codes: Tensor | None, *_: object
) -> str | None:
    """Return why the kernel cannot summarise these pages, or None."""
    if codes is not None and codes.shape[-1] % 16:
        return _sixteens(codes)
    return _channels(keys.shape[-1]) or _pages(low, high, codes)


def _sixteens(codes: Tensor) -> str:
    return f"codes of {codes.shape[-1]} bytes are not a multiple of 16"


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
    call = _KeyCodes(
        keys=address("keys", keys, kind, (heads, total, dim), strided=2),
        low=address("low", low, kind, bounds, strided=1, written=True),
        high=address("high", high, kind, bounds, strided=1, written=True),
        codes=optional("codes", codes, torch.uint8, coded, strided=1, written=True),
        key_head=keys.stride(0),
        key_row=keys.stride(1),
        bounds_head=low.stride(0),
        codes_head=0 if codes is None else codes.stride(0),
        heads=heads,
        dim=dim,
        page=page,
        bits=0 if codes is None else bits,
        columns=total,
        first=first,
        half=kind is torch.bfloat16,
        threads=library.threads(),
    )
    library.function("summarise_pages", POINTER(_KeyCodes))(byref(call))


def code_logits(queries: Tensor, of: KeyCodes, *, scaling: float) -> Tensor:
    """See the operation."""
    heads, rows = of.low.shape[0], queries.shape[0] // of.low.shape[0] * queries.shape[1]
    logits = torch.empty(heads, rows, of.columns, dtype=torch.float32, device="cpu")
    calls, kept = (_KeyCodes * 1)(), list[Tensor]()
    _pack(calls, 0, queries, of, scaling, kept, logits=address("logits", logits, torch.float32, logits.shape))
    library.call("code_logits", POINTER(_KeyCodes))(calls)
    return logits


def code_jumps(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, budget: int, *, scaling: float, observed: Tensor | None
) -> Tensor:
    """See the operation."""
    return _choose([(queries, of, base, tail, budget, 0, None, observed, None, 0)], scaling)[0][0]


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
    ((columns, counts),) = _choose([(queries, of, base, tail, most, least, threshold, observed, None, 0)], scaling)
    return columns, torch.tensor(counts, dtype=torch.long, device="cpu")


def choose_columns(
    _: Tensor, choices: Sequence[ColumnChoice], *, scaling: float, softcap: float | None
) -> list[tuple[Tensor, list[int]]]:
    """See the operation."""
    return _choose(choices, scaling)


def _choose(choices: Sequence[tuple[Any, ...]], scaling: float) -> list[tuple[Tensor, list[int]]]:
    """Choose columns for several sessions by one kernel call. choices: the fields of ``ColumnChoice``, in order."""
    calls, kept = (_KeyCodes * len(choices))(), list[Tensor]()  # kept: copies must stay alive during the call
    heads = choices[0][1].low.shape[0]
    counts, place = fresh(len(choices), heads, dtype=torch.long)
    widths = [base.shape[1] + most for _, _, base, _, most, *_ in choices]
    chosen, out = fresh(heads * sum(widths), dtype=torch.long)
    for index, (queries, of, base, tail, most, least, threshold, observed, keys, first) in enumerate(choices):
        base = base.contiguous()
        kept.append(base)
        _pack(
            calls,
            index,
            queries,
            of,
            scaling,
            kept,
            keys=keys,
            first=first,
            base=address("base", base, torch.long, (heads, base.shape[1])),
            chosen=out,
            observed=optional("observed", observed, torch.float32, (heads, tail)) or 0,
            counts=place,
            choice=(base.shape[1], tail, most, least, threshold is not None),
            threshold=threshold or 0.0,
        )
        place, out = place + heads * 8, out + heads * widths[index] * 8
    library.call("choose_columns", POINTER(_KeyCodes), c_int64)(calls, len(choices))
    found, start = [], 0
    for choice, width, own in zip(choices, widths, counts.tolist(), strict=True):
        if min(own) < 0:
            raise ValueError(f"choose_columns: base columns must lie in [0, {choice[3]}), got {choice[2].tolist()}")
        longest = max(own)
        found.append((chosen.as_strided((heads, longest), (longest, 1), start), own))
        start += heads * width
    return found


class _Places(NamedTuple):
    """Hold the addresses of checked buffers and the strides of their heads."""

    buffers: tuple[int, int, int]
    strides: tuple[int, int]


def _places(of: KeyCodes) -> _Places:
    """Return where the buffers lie. They are checked once, unless their memory moves."""
    low, high, codes = of.low, of.high, of.codes
    held: _Places | None = of.places
    if held is None or held.buffers != library.places(low, high, codes):
        bounds, kind = low.shape, number_type(low)
        coded = (*bounds[:2], codes.shape[2], bounds[2] * of.bits // 8)
        found = (
            address("low", low, kind, bounds, strided=1, written=True),
            address("high", high, kind, bounds, strided=1, written=True),
            address("codes", codes, torch.uint8, coded, strided=1, written=True),
        )
        of.places = held = _Places(found, (low.stride(0), codes.stride(0)))
    return held


def _pack(
    calls: Any,
    index: int,
    queries: Tensor,
    of: KeyCodes,
    scaling: float,
    kept: list[Tensor],
    *,
    keys: Tensor | None = None,
    first: int = 0,
    logits: int = 0,
    base: int = 0,
    chosen: int = 0,
    observed: int = 0,
    counts: int = 0,
    choice: tuple[int, int, int, int, bool] = (0, 0, 0, 0, False),
    threshold: float = 0.0,
) -> None:
    """Fill the struct of a call. kept: see ``rows_address``. logits to counts: addresses. choice: the fields from
    ``base_count`` to ``relative``.
    """
    given, (heads, _, dim), places = number_type(queries), of.low.shape, _places(of)
    query_place, *query_strides = rows_address("queries", queries, given, queries.shape, kept)
    key_place, *key_strides = 0, 0, 0
    if keys is not None:
        key_place, *key_strides = rows_address("keys", keys, of.low.dtype, (heads, of.columns, dim), kept)
    _PACKED.pack_into(
        calls,
        index * _PACKED.size,
        query_place,
        key_place,
        *places.buffers,
        logits,
        base,
        chosen,
        observed,
        counts,
        *query_strides,
        *key_strides,
        *places.strides,
        heads,
        queries.shape[0] // heads,
        queries.shape[1],
        dim,
        of.codes.shape[2],
        of.bits,
        of.columns,
        first,
        of.low.dtype is torch.bfloat16,
        given is torch.bfloat16,
        *choice,
        library.threads(),
        scaling,
        threshold,
    )
