"""Call the compiled attention of new queries over a store: dense, over the active set, on lines or on tiles."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p, sizeof
from struct import Struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.library import (
    MOST_COLUMNS,
    address,
    fresh,
    large_pages,
    number_type,
    optional,
    rows_address,
    rows_of,
)
from loopserve.kernels.paged import Paged, gathered

if TYPE_CHECKING:
    from loopserve.kernels.decode_attention import DecodeRequest
    from loopserve.kernels.paged import Rows

ROWS = 64  # rows per tile, as in tile.h
FEW = 16  # query rows per KV head up to which cells are computed one by one, with channels in the vector lanes


class _Attention(Structure):
    """Mirror the struct ``Attention`` of attention.h; strides count numbers."""

    _fields_ = [  # ctypes requires a list
        *(
            (name, c_void_p)
            for name in (
                "queries",
                "keys",
                "values",
                "output",
                "lse",
                "verticals",
                "slashes",
                "blocks",
                "first_valid",
                "columns",
            )
        ),
        *((name, c_int64) for name in ("query_head", "query_row", "key_head", "key_row", "value_head", "value_row")),
        *((name, c_int64) for name in ("heads", "group", "rows", "total", "dim", "window", "half", "threads")),
        ("chosen", c_int64),
        ("tail", c_int64),
        ("scaling", c_float),
    ]


_PACKED = Struct("10P16qf4x")  # the same fields; a struct format fills them in one call
assert _PACKED.size == sizeof(_Attention)


def limit(queries: Tensor, _: Rows, values: Rows, *__: object, softcap: float | None, **___: object) -> str | None:
    """Return why the compiled attention cannot serve these arguments, or None."""
    if isinstance(values, Paged):
        return "keys that lie in blocks"
    dim = queries.shape[-1]
    if softcap:
        return "softcap"
    if values.shape[-1] != dim:
        return f"values of {values.shape[-1]} channels beside keys of {dim}"
    if values.shape[1] > MOST_COLUMNS:
        return f"more than {MOST_COLUMNS} columns"
    step = 16 if queries.dtype is torch.float32 else 32
    return None if dim % step == 0 else f"{dim} channels are not a multiple of {step}"


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    kernel: str = "vertical_slash",
    lines: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    first_valid: Tensor | None = None,
    columns: Tensor | None = None,
    tail: int = 0,
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output ``[Hq, Tq, D]`` and log-sum-exp ``[Hq, Tq]`` of the last Tq queries.

    The queries attend on lines (verticals and slashes, bool ``[Hq, Tk]``), or to every cell within a window of at least
    ``ROWS``. kernel ``decode_attention``: for few queries, which may attend to ``columns`` int64 ``[Hkv, S]`` and every
    column from ``tail`` on. kernel ``block_sparse``: for ``blocks`` bool ``[Hq, row tiles, key tiles]`` of ``window``
    rows and keys each.
    """
    queries, keys, values = rows_of(queries), rows_of(keys), rows_of(values)
    kind = number_type(queries)
    heads, rows, dim = queries.shape
    owners, total = keys.shape[:2]
    window = total if window is None else window
    output = large_pages(queries.new_empty(heads, rows, dim))
    lse = torch.empty(heads, rows, dtype=torch.float32, device="cpu")
    verticals, slashes = (None, None) if lines is None else (each.contiguous() for each in lines)
    starts = None if first_valid is None else first_valid.contiguous()
    columns = None if columns is None else columns.contiguous()
    blocks = None if blocks is None else blocks.contiguous()
    chosen = -1 if columns is None else columns.shape[1]
    call = _Attention(
        address("queries", queries, kind, (heads, rows, dim), strided=2),
        address("keys", keys, kind, (owners, total, dim), strided=2),
        address("values", values, kind, (owners, total, dim), strided=2),
        address("output", output, kind, (heads, rows, dim)),
        address("lse", lse, torch.float32, (heads, rows)),
        optional("verticals", verticals, torch.bool, (heads, total)),
        optional("slashes", slashes, torch.bool, (heads, total)),
        optional("blocks", blocks, torch.bool, (heads, -(-rows // window), -(-total // window))),
        optional("first_valid", starts, torch.long, (owners,)),
        optional("columns", columns, torch.long, (owners, chosen)),
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        heads,
        heads // owners,
        rows,
        total,
        dim,
        window,
        kind is torch.bfloat16,
        library.threads(),
        chosen,
        tail,
        scaling,
    )
    library.call(kernel, POINTER(_Attention))(byref(call))
    return output, lse


def attend_batch(
    requests: Sequence[DecodeRequest], *, scaling: float, need_lse: bool = True
) -> list[tuple[Tensor, Tensor | None]]:
    """Return output ``[Hq, t, D]`` and, with ``need_lse``, log-sum-exp ``[Hq, t]`` of several sessions by one kernel
    call.

    A request is (queries, keys, values, first_valid, columns, tail) as ``attend`` takes them. Requests may differ in t,
    in the number of keys and in the chosen columns. Where t is the same for all, the outputs are views of one tensor
    ``[sessions, Hq, t, D]``.
    """
    example = requests[0][0]
    kind, (heads, _, dim) = number_type(example), example.shape
    half, threads, owners = kind is torch.bfloat16, library.threads(), requests[0][1].shape[0]
    rows = [each[0].shape[1] for each in requests]
    total = sum(rows)
    output, place = fresh(total, heads, dim, dtype=kind)
    lse, lse_place = fresh(total, heads, dtype=torch.float32)
    calls, kept = (_Attention * len(rows))(), list[Tensor]()  # kept: copies must stay alive during the call
    for index, (count, (queries, keys, values, starts, columns, tail)) in enumerate(zip(rows, requests, strict=True)):
        if isinstance(keys, Paged) or isinstance(values, Paged):
            keys, values = gathered(keys, values)
        starts = None if starts is None else starts.contiguous()
        columns = None if columns is None else columns.contiguous()
        kept += [each for each in (keys, values, starts, columns) if each is not None]
        total = keys.shape[1]
        chosen = -1 if columns is None else columns.shape[1]
        query_place, *query_strides = rows_address("queries", queries, kind, (heads, count, dim), kept)
        key_place, *key_strides = rows_address("keys", keys, kind, (owners, total, dim), kept)
        value_place, *value_strides = rows_address("values", values, kind, (owners, total, dim), kept)
        _PACKED.pack_into(
            calls,
            index * _PACKED.size,
            query_place,
            key_place,
            value_place,
            place,
            lse_place,
            *(0, 0, 0),  # no lines, no blocks
            optional("first_valid", starts, torch.long, (owners,)) or 0,
            optional("columns", columns, torch.long, (owners, chosen)) or 0,
            *query_strides,
            *key_strides,
            *value_strides,
            heads,
            heads // owners,
            count,
            total,
            dim,
            total,
            half,
            threads,
            chosen,
            tail,
            scaling,
        )
        place += count * heads * dim * kind.itemsize
        lse_place += count * heads * 4
    library.call("decode_attention_batch", POINTER(_Attention), c_int64)(calls, len(rows))
    outputs = _by_session(output, rows)
    return (
        [(each, None) for each in outputs] if not need_lse else list(zip(outputs, _by_session(lse, rows), strict=True))
    )


def _by_session(whole: Tensor, rows: list[int]) -> Sequence[Tensor]:
    """Return views ``[Hq, t, ...]`` of consecutive sessions, each ordered by head, in ``[sum t, Hq, ...]``."""
    heads, rest = whole.shape[1], whole.shape[2:]
    if rows.count(rows[0]) == len(rows):
        return whole.view(len(rows), heads, rows[0], *rest).unbind()
    return [part.view(heads, count, *rest) for count, part in zip(rows, whole.split(rows), strict=True)]


def dense_limit(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    softcap: float | None,
    window: int | None = None,
    columns: Tensor | None = None,
    **_: object,
) -> str | None:
    """Return why ``dense_attention`` cannot serve these arguments, or None."""
    if columns is not None:
        return "rows that stand anywhere"
    if window is not None and window < min(ROWS, keys.shape[1]):
        return f"a window of {window}"
    return limit(queries, keys, values, softcap=softcap)


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
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute over all keys or a window. The log-sum-exp has no extra cost here and is always returned."""
    few = queries.shape[0] // keys.shape[0] * queries.shape[1] <= FEW
    if few and window is not None:  # each later row leaves out one more column than the first row
        few = window >= keys.shape[1]
    kernel = "decode_attention" if few else "vertical_slash"
    return attend(queries, keys, values, scaling=scaling, kernel=kernel, window=window, first_valid=first_valid)


def batch_limit(_: Tensor, requests: Sequence[DecodeRequest], *, softcap: float | None, **__: object) -> str | None:
    """Return why the kernel cannot serve one of a batch, or None."""
    for each in requests:
        if (problem := limit(*each[:3], softcap=softcap)) is not None:
            return problem
    return None


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    columns: Tensor | None,
    tail: int,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute over the active set. The log-sum-exp has no extra cost here and is always returned."""
    if columns is None:
        return dense_attention(queries, keys, values, scaling=scaling, first_valid=first_valid)
    return attend(queries, keys, values, scaling=scaling, kernel="decode_attention", columns=columns, tail=tail)


def decode_attention_batch(
    _: Tensor, requests: Sequence[DecodeRequest], *, scaling: float, softcap: float | None, need_lse: bool = True
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute for several sessions. Each result equals that of ``decode_attention`` for the request alone, bit by bit."""
    group = requests[0].queries.shape[0] // requests[0].keys.shape[0]
    most = FEW // group
    together = [each.columns is not None or each.queries.shape[1] <= most for each in requests]
    if all(together):
        return attend_batch(requests, scaling=scaling, need_lse=need_lse)
    few_rows = [each for each, few in zip(requests, together, strict=True) if few]
    found = iter(attend_batch(few_rows, scaling=scaling, need_lse=need_lse) if few_rows else ())
    return [
        next(found) if few else dense_attention(*gathered(*each[:3]), scaling=scaling, first_valid=each.first_valid)
        for each, few in zip(requests, together, strict=True)
    ]


def block_sparse(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    *,
    tile: int,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute on the selected tiles."""
    return attend(
        queries,
        keys,
        values,
        scaling=scaling,
        kernel="block_sparse",
        window=tile,
        blocks=blocks,
        first_valid=first_valid,
    )


def vertical_slash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute on the lines."""
    return attend(queries, keys, values, scaling=scaling, lines=(verticals, slashes), first_valid=first_valid)
