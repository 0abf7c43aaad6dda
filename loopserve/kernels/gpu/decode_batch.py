"""Compute attention of several sessions of different lengths by one launch.

The kernel loads the addresses, strides and lengths of each session from a table. Each session is split by its own length,
as in a call of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.decode_attention import DecodeRequest
from loopserve.kernels.gpu.decode_attention import Split, attend_slots, decode_attention, split
from loopserve.kernels.gpu.launch import (
    Located,
    attention_tile,
    launch,
    located,
    padded,
    readable,
    row_strides,
    score_factors,
    tile_options,
)
from loopserve.kernels.gpu.tiles import empty_result, merge_parts, store_rows
from loopserve.kernels.paged import Paged

_MOST_ROWS = 32  # of a tile, at most: with 64, the values loaded for a session exceed the registers
_ALIGNED = 16  # bytes that are read at once


def _place(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> int:
    """Return the address of a tensor's first number, for a kernel that loads the strides from a table.

    Raises ValueError unless dtype and device fit and the last dimension is dense.
    """
    if tensor.dtype is not dtype or tensor.device != device or tensor.stride(-1) != 1 or tensor.is_neg():
        held = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}"
        raise ValueError(f"{name} must be {dtype} on {device}, dense in the last dimension; got {held}")
    return tensor.data_ptr()


def _uploaded(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Copy int64 numbers to a device without synchronising."""
    found = torch.frombuffer(array("q", numbers), dtype=torch.int64)
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def _aligned(table: Sequence[Sequence[int]], places: slice, strides: Sequence[int], element_size: int) -> int:
    """Return by how many numbers all strides in the rows of a table divide, if addresses are multiples of 16 bytes;
    else 0.

    The compiler cannot derive the alignment of an address that a kernel loads, so it is passed as a constant.
    """
    step = _ALIGNED // element_size
    good = all(
        not any(each % _ALIGNED for each in row[places]) and not any(row[each] % step for each in strides)
        for row in table
    )
    return step if good else 0


def _by_session(whole: Tensor, heads: int, rows: list[int]) -> Sequence[Tensor]:
    """Return the rows ``[Hq, t, ...]`` of each session from ``[sessions * Hkv, group * most t, ...]``, as views where t
    is the same for all.
    """
    rest = whole.shape[2:]
    if rows.count(rows[0]) == len(rows):
        return whole.view(len(rows), heads, rows[0], *rest).unbind()
    parts = whole.view(len(rows), -1, *whole.shape[1:]).unbind()
    group = [heads // len(parts[0]) * count for count in rows]
    return [part[:, :own].reshape(heads, count, *rest) for part, own, count in zip(parts, group, rows, strict=True)]


@triton.jit(do_not_specialize=["most_rows"])
def decode_batch_kernel(
    sample: tl.tensor,
    table: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    part_output: tl.tensor,
    part_lse: tl.tensor,
    most_rows: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    FIELDS: tl.constexpr,
    OWNERS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FILLER: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Compute attention of several sessions.

    Grid: parts of the longest session, KV heads of all sessions, tiles of rows.

    table ``[sessions, FIELDS]``: as ``_fields`` fills it. sample: any pointer to numbers of the dtype of the queries.
    ALIGNED: every address is a multiple of 16 bytes and every stride a multiple of this many numbers; 0 if not. Output
    and lse: ``[sessions, Hkv, GROUP * most_rows]`` for sessions of one part, else parts of ROWS rows. SIZE: rows of a
    block of every store, 0 for stores in one piece.
    """
    part = tl.program_id(0)
    session = tl.program_id(1) // OWNERS
    head = (tl.program_id(1) % OWNERS).to(tl.int64)
    tile = tl.program_id(2)
    entry = table + session * FIELDS
    kind = tl.pointer_type(sample.dtype.element_ty)
    q, k, v = tl.load(entry).to(kind), tl.load(entry + 1).to(kind), tl.load(entry + 2).to(kind)
    first_valid, columns = tl.load(entry + 3), tl.load(entry + 4).to(tl.pointer_type(tl.int64))
    q_head, k_head, v_head = tl.load(entry + 5), tl.load(entry + 7), tl.load(entry + 9)
    q_row, k_row = tl.load(entry + 6).to(tl.int32), tl.load(entry + 8).to(tl.int32)
    v_row = tl.load(entry + 10).to(tl.int32)
    blocks, k_block, v_block = None, None, None
    if SIZE:
        blocks = tl.load(entry + 18).to(tl.pointer_type(tl.int64))
        k_block, v_block = tl.load(entry + 19), tl.load(entry + 20)
        if ALIGNED:
            k_block, v_block = tl.multiple_of(k_block, ALIGNED), tl.multiple_of(v_block, ALIGNED)
    if ALIGNED:  # the compiler knows no alignment of loaded addresses, and would read single numbers
        q, k, v = tl.multiple_of(q, 16), tl.multiple_of(k, 16), tl.multiple_of(v, 16)
        q_head, q_row = tl.multiple_of(q_head, ALIGNED), tl.multiple_of(q_row, ALIGNED)
        k_head, k_row = tl.multiple_of(k_head, ALIGNED), tl.multiple_of(k_row, ALIGNED)
        v_head, v_row = tl.multiple_of(v_head, ALIGNED), tl.multiple_of(v_row, ALIGNED)
    rows, total = tl.load(entry + 11).to(tl.int32), tl.load(entry + 12).to(tl.int32)
    chosen, tail = tl.load(entry + 13).to(tl.int32), tl.load(entry + 14).to(tl.int32)
    parts, part_slots = tl.load(entry + 15).to(tl.int32), tl.load(entry + 16).to(tl.int32)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < tl.where(part < parts, GROUP * rows, 0)  # shorter sessions have fewer parts
    channel = tl.arange(0, PADDED)
    places = q + (head * GROUP + row // rows)[:, None] * q_head + (row % rows)[:, None] * q_row + channel[None, :]
    q_tile = tl.load(places, mask=inside[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    first_column = 0
    if HAS_FILLER:  # noqa: SIM102 (one is decided by the compiler, one on the device)
        if first_valid != 0:
            first_column = tl.load(first_valid.to(tl.pointer_type(tl.int64)) + head).to(tl.int32)
    found, found_lse = attend_slots(
        q_tile, k + head * k_head, v + head * v_head, k_row, v_row, columns + head * chosen, first_column,
        row, rows, total, chosen, tail, part * part_slots, part_slots, inner, outer,
        ROWS, KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, HAS_COLUMNS,
        blocks, k_block, v_block, SIZE,
    )  # fmt: skip
    if parts == 1:
        first = tl.program_id(1).to(tl.int64) * GROUP * most_rows
        store_rows(output + first * VALUE_CHANNELS, row, VALUE_CHANNELS, inside, found, VALUE_CHANNELS, VALUE_PADDED)
        tl.store(lse + first + row, found_lse, mask=inside)
    elif part < parts:
        within = tl.arange(0, ROWS)
        first = (tl.load(entry + 17) + (head * tl.num_programs(2) + tile) * parts + part) * ROWS
        store_rows(
            part_output + first * VALUE_CHANNELS, within, VALUE_CHANNELS, within >= 0, found,
            VALUE_CHANNELS, VALUE_PADDED,
        )  # fmt: skip
        tl.store(part_lse + first + within, found_lse)


_FIELDS = 18  # of a session in the table, and 3 more of one in blocks


def _fields(request: DecodeRequest, place: Located, parts: Split, first_part: int) -> list[int]:
    """Return the row of a session in the table of ``decode_batch_kernel``."""
    queries, keys, _values, first_valid, columns, tail = request
    kind, device = queries.dtype, queries.device
    table, *strides = place.in_blocks[:3]
    return [
        _place("queries", queries, kind, device),
        _place("keys", place.store[0], kind, device),
        _place("values", place.store[1], kind, device),
        0 if first_valid is None else _place("first_valid", first_valid, torch.long, device),
        0 if columns is None else _place("columns", columns, torch.long, device),
        *row_strides(queries),
        *place.strides,
        queries.shape[1],
        keys.shape[1],
        0 if columns is None else columns.shape[1],
        tail,
        *parts,
        first_part,
        *(() if table is None else [_place("block table", table, torch.long, device), *strides]),
    ]


def _read_by_place(request: DecodeRequest) -> tuple[DecodeRequest, Located]:
    """Return the request with tensors that a kernel can read from the address of their first number, and where its keys are."""
    queries, keys, values, first_valid, columns, tail = request
    held = DecodeRequest(
        readable(queries),
        keys,
        values,
        None if first_valid is None else first_valid.contiguous(),
        None if columns is None else columns.contiguous(),
        tail,
    )
    return held, located(keys, values)


def _by_size(requests: Sequence[DecodeRequest]) -> dict[int, list[int]]:
    """Return the numbers of the requests whose keys lie in blocks of a size; 0: in one piece."""
    found: dict[int, list[int]] = {}
    for number, each in enumerate(requests):
        found.setdefault(each.keys.size if isinstance(each.keys, Paged) else 0, []).append(number)
    return found


def decode_attention_batch(
    _: Tensor,
    requests: Sequence[DecodeRequest],
    *,
    scaling: float,
    softcap: float | None = None,
    need_lse: bool = True,
) -> list[tuple[Tensor, Tensor | None]]:
    """See the operation. Where t is the same for all, each session is split and computed as in a call of its own.

    Stores in one piece and those in blocks of each size go through a launch of their own.
    """
    found: list[tuple[Tensor, Tensor | None]] = [(requests[0].queries, None)] * len(requests)
    for numbers in _by_size(requests).values():
        alike = [requests[each] for each in numbers]
        part = [_alone(alike[0], scaling, softcap, need_lse)] if len(alike) == 1 else _alike(alike, scaling, softcap)
        for number, each in zip(numbers, part, strict=True):
            found[number] = each
    return found


def _alone(
    request: DecodeRequest, scaling: float, softcap: float | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    queries, keys, values, first_valid, columns, tail = request
    return decode_attention(
        queries,
        keys,
        values,
        scaling=scaling,
        softcap=softcap,
        first_valid=first_valid,
        columns=columns,
        tail=tail,
        need_lse=need_lse,
    )


def _alike(given: Sequence[DecodeRequest], scaling: float, softcap: float | None) -> list[tuple[Tensor, Tensor | None]]:
    """Compute sessions whose stores are all in one piece, or all in blocks of one size, by one launch."""
    requests, places = zip(*(_read_by_place(each) for each in given), strict=True)
    (heads, _rows, _channels), (owners, _total, value_channels) = requests[0].queries.shape, requests[0].values.shape
    group, like = heads // owners, requests[0].queries
    most_rows = max(each.queries.shape[1] for each in requests)
    shape = attention_tile(like, value_channels)
    shape = shape._replace(rows=min(shape.rows, _MOST_ROWS, padded(group * most_rows)))
    tiles = -(-group * most_rows // shape.rows)
    table: list[list[int]] = []
    first_parts: list[int] = []  # of each tile of rows
    counts: list[int] = []
    parts = 0
    for each, place in zip(requests, places, strict=True):
        slots = each.keys.shape[1] if each.columns is None else each.columns.shape[1] + each.keys.shape[1] - each.tail
        own = split(slots, owners * tiles, shape, like.device)
        table.append(_fields(each, place, own, parts))
        first_parts += range(parts, parts + owners * tiles * own.parts, own.parts)
        counts += [own.parts] * (owners * tiles)
        parts += owners * tiles * own.parts
    most_parts, fields = max(counts), len(table[0])
    parts = parts if most_parts > 1 else 0
    numbers = _uploaded([number for fields in table for number in fields] + first_parts + counts, like.device)
    output, lse = empty_result(
        len(requests) * owners, group * most_rows, value_channels, dtype=like.dtype, device=like.device
    )
    found, found_lse = empty_result(parts, shape.rows, value_channels, dtype=torch.float32, device=like.device)
    launch(
        decode_batch_kernel,
        (most_parts, len(requests) * owners, tiles),
        like,
        numbers,
        output,
        lse,
        found,
        found_lse,
        most_rows,
        *score_factors(scaling, softcap),
        FIELDS=fields,
        OWNERS=owners,
        ROWS=shape.rows,
        KEYS=shape.keys,
        GROUP=group,
        HAS_FILLER=any(each.first_valid is not None for each in requests),
        HAS_COLUMNS=any(each.columns is not None for each in requests),
        ALIGNED=_aligned(table, slice(0, 3), [*range(5, 11), *range(_FIELDS + 1, fields)], like.element_size()),
        SIZE=places[0].in_blocks.size,
        **tile_options(like, value_channels, shape, softcap),
    )
    if parts:
        fields_in_all, tiles_in_all = len(requests) * fields, len(counts)
        merge_parts(
            found,
            found_lse,
            output,
            lse,
            tile_rows=shape.rows,
            first_part=numbers[fields_in_all : fields_in_all + tiles_in_all],
            part_count=numbers[fields_in_all + tiles_in_all :],
        )
    rows = [each.queries.shape[1] for each in requests]
    outputs, lses = _by_session(output, heads, rows), _by_session(lse, heads, rows)
    return list(zip(outputs, lses, strict=True))
