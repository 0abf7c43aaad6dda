"""Compute line attention on a GPU: a persistent kernel over a work list, each item a sequence of key tiles for one tile
of rows.

The sequence has three parts: chunks of keys whose cells are all on slashes, chunks that need a mask of offsets, and
chosen columns that are copied together once per head. Slash chunks leave out chosen columns, so that a cell counts
once.

The keys that a tile of rows needs for its slashes depend only on their distance before the first row of the tile. So
``plan`` lists the chunks of keys on the device, once per head, nearest first and unaligned, and a tile reads those that
begin inside the store. Its verticals are the chosen columns in ascending order, up to its last row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.gpu.gather_kv import packed_columns
from loopserve.kernels.gpu.launch import (
    attention_tile,
    launch,
    located,
    readable,
    row_strides,
    score_factors,
    tile_options,
)
from loopserve.kernels.gpu.tiles import (
    empty_result,
    empty_softmax,
    load_rows,
    merge_parts,
    scored,
    store_item,
    taken_in,
)
from loopserve.kernels.gpu.work import WORD_PADDING, WorkList, compacted_rows, flag_words, load_item, window, work_list
from loopserve.kernels.paged import Rows

LENGTH_BITS = 8  # a chunk is encoded as its distance, with the number of keys it owns in the low bits
_NEVER = 1 << 30
_LEAST_PACKED = 2048
_PACKED_SHARE = 8  # capacity for copied columns: one in this many, at least _LEAST_PACKED; each tile gathers the others


@triton.jit(do_not_specialize=["rows", "total", "tiles", "group", "row_tiles", "chunk_capacity", "word_count"])
def vertical_slash_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    packed_k: tl.tensor,
    packed_v: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    part_output: tl.tensor,
    part_lse: tl.tensor,
    plain_chunks: tl.tensor,
    cut_chunks: tl.tensor,
    slash_words: tl.tensor,
    vertical_words: tl.tensor,
    columns: tl.tensor,
    counts: tl.tensor,
    items: tl.tensor,
    item_count: tl.tensor,
    first_valid: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    tiles: tl.tensor,
    group: tl.tensor,
    row_tiles: tl.tensor,
    chunk_capacity: tl.tensor,
    word_count: tl.tensor,
    packed_capacity: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    table: tl.tensor,
    k_block: tl.tensor,
    v_block: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    PADDING: tl.constexpr,
    LENGTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FILLER: tl.constexpr,
    GATHERS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Compute the items of the work list. table, k_block, v_block, SIZE: see ``tiles.offsets``.

    See the module. Each program takes every ``num_programs``-th item; the longest come first.
    """
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    for item in range(tl.program_id(0), tl.load(item_count), tl.num_programs(0)):
        row_tile, begin, end, part = load_item(items, item)
        head = (row_tile // tiles).to(tl.int64)
        start = row_tile % tiles * ROWS
        inside = start + row < rows
        column0 = total - rows + start
        q_tile = load_rows(q + head * q_head, start + row, q_row, inside, CHANNELS, PADDED)
        keys_at = k + head // group * k_head
        values_at = v + head // group * v_head
        oldest = 0
        if HAS_FILLER:
            oldest = tl.load(first_valid + head // group).to(tl.int32)
        plain_end = tl.load(counts + row_tile)
        cut_end = plain_end + tl.load(counts + row_tiles + row_tile)
        column_count = tl.load(counts + 2 * row_tiles + row_tile)
        taken = vertical_words + head * word_count
        acc, sums, peak = empty_softmax(ROWS, VALUE_PADDED)

        for step in range(begin, tl.minimum(end, plain_end)):
            distance = tl.load(plain_chunks + head * chunk_capacity + step) >> LENGTH
            first = column0 + ROWS - KEYS - distance
            keys = first + key
            held = (keys >= oldest) & (keys < total)
            k_tile = load_rows(keys_at, keys, k_row, held, CHANNELS, PADDED, table, k_block, SIZE)
            v_tile = load_rows(values_at, keys, v_row, held, VALUE_CHANNELS, VALUE_PADDED, table, v_block, SIZE)
            low, high = window(taken, first, PADDING)
            seen = held & ((tl.where(key < 32, low, high) >> (key & 31) & 1) == 0)
            scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            acc, sums, peak = taken_in(acc, sums, peak, scores, v_tile, PRECISION)

        for step in range(tl.maximum(begin, plain_end), tl.minimum(end, cut_end)):
            chunk = tl.load(cut_chunks + head * chunk_capacity + step - plain_end)
            distance = chunk >> LENGTH
            owned = chunk & ((1 << LENGTH) - 1)
            first = column0 + ROWS - KEYS - distance
            keys = first + key
            held = (keys >= oldest) & (keys < total) & (key >= KEYS - owned)
            k_tile = load_rows(keys_at, keys, k_row, held, CHANNELS, PADDED, table, k_block, SIZE)
            v_tile = load_rows(values_at, keys, v_row, held, VALUE_CHANNELS, VALUE_PADDED, table, v_block, SIZE)
            low, high = window(taken, first, PADDING)
            open_keys = held & ((tl.where(key < 32, low, high) >> (key & 31) & 1) == 0)
            # Slashes are stored by descending offset, so that the cells of a row are adjacent flags.
            near, far = window(slash_words + head * word_count, total - 1 - (row - ROWS + KEYS + distance), PADDING)
            flags = tl.where((key < 32)[None, :], near[:, None], far[:, None])
            seen = open_keys[None, :] & ((flags >> (key & 31)[None, :] & 1) == 1)
            scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
            acc, sums, peak = taken_in(acc, sums, peak, tl.where(seen, scores, float("-inf")), v_tile, PRECISION)

        packed_end = cut_end + packed_capacity // KEYS
        for step in range(tl.maximum(begin, cut_end), tl.minimum(end, packed_end)):
            slot = (step - cut_end) * KEYS + key
            held = slot < column_count
            position = tl.load(columns + head * total + slot, mask=held, other=2147483647)
            k_tile = load_rows(packed_k + head * packed_capacity * CHANNELS, slot, CHANNELS, held, CHANNELS, PADDED)
            v_tile = load_rows(
                packed_v + head * packed_capacity * VALUE_CHANNELS,
                slot,
                VALUE_CHANNELS,
                held,
                VALUE_CHANNELS,
                VALUE_PADDED,
            )
            scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
            seen = position[None, :] <= (column0 + row)[:, None]
            acc, sums, peak = taken_in(acc, sums, peak, tl.where(seen, scores, float("-inf")), v_tile, PRECISION)

        if GATHERS:
            for step in range(tl.maximum(begin, packed_end), end):
                slot = (step - cut_end) * KEYS + key
                held = slot < column_count
                position = tl.load(columns + head * total + slot, mask=held, other=2147483647)
                k_tile = load_rows(keys_at, position, k_row, held, CHANNELS, PADDED, table, k_block, SIZE)
                v_tile = load_rows(values_at, position, v_row, held, VALUE_CHANNELS, VALUE_PADDED, table, v_block, SIZE)
                scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
                seen = position[None, :] <= (column0 + row)[:, None]
                acc, sums, peak = taken_in(acc, sums, peak, tl.where(seen, scores, float("-inf")), v_tile, PRECISION)

        store_item(
            output, lse, part_output, part_lse, acc, sums, peak, head, start, rows, part,
            ROWS, VALUE_CHANNELS, VALUE_PADDED,
        )  # fmt: skip


def vertical_slash(
    queries: Tensor,
    keys: Rows,
    values: Rows,
    verticals: Tensor,
    slashes: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the operation."""
    queries, place = readable(queries), located(keys, values)
    heads, rows = queries.shape[:2]
    total, value_channels, group = keys.shape[1], values.shape[2], heads // keys.shape[0]
    shape = attention_tile(queries, value_channels)
    per_head = None if first_valid is None else first_valid.repeat_interleave(group, output_size=heads)
    made = plan(verticals, slashes, per_head, rows, tile_rows=shape.rows, tile_keys=shape.keys)
    capacity = min(total, max(_LEAST_PACKED, total // _PACKED_SHARE))
    capacity = -(-capacity // shape.keys) * shape.keys
    tiles = -(-rows // shape.rows)
    packed_keys, packed_values = packed_columns(
        place, made.columns, made.counts[2].view(heads, -1)[:, -1], capacity, block=shape.keys
    )
    output, lse = empty_result(heads, rows, value_channels, dtype=queries.dtype, device=queries.device)
    part_output, part_lse = empty_result(
        made.work.parts, shape.rows, value_channels, dtype=torch.float32, device=queries.device
    )
    launch(
        vertical_slash_kernel,
        (made.work.programs,),
        queries,
        *place.store,
        packed_keys,
        packed_values,
        output,
        lse,
        part_output,
        part_lse,
        made.plain_chunks,
        made.cut_chunks,
        made.slash_words,
        made.vertical_words,
        made.columns,
        made.counts,
        made.work.items,
        made.work.count,
        lse if first_valid is None else first_valid,
        *row_strides(queries),
        *place.strides,
        rows,
        total,
        tiles,
        group,
        heads * tiles,
        made.plain_chunks.shape[1],
        made.slash_words.shape[1],
        capacity,
        *score_factors(scaling, softcap),
        *place.in_blocks[:3],
        ROWS=shape.rows,
        KEYS=shape.keys,
        PADDING=WORD_PADDING,
        LENGTH=LENGTH_BITS,
        HAS_FILLER=first_valid is not None,
        GATHERS=capacity < total,
        SIZE=place.in_blocks.size,
        **tile_options(queries, value_channels, shape, softcap),
    )
    merge_parts(
        part_output,
        part_lse,
        output,
        lse,
        tile_rows=shape.rows,
        first_part=made.work.first_part,
        part_count=made.work.part_count,
    )
    return output, lse


@dataclass(frozen=True)
class Plan:
    """Hold lists per head and counts per tile of rows.

    plain_chunks, cut_chunks int32 ``[Hq, C]``: distance << LENGTH_BITS | keys owned, for chunks whose cells are all on
    slashes, and for the others. slash_words, vertical_words int64 ``[Hq, W]``: 64 flags from each 32nd on, slashes by
    descending offset. columns int32 ``[Hq, n]``: chosen verticals. counts int32 ``[3, Hq * tiles]``: plain chunks, cut
    chunks and columns that a tile of rows reads.
    """

    plain_chunks: Tensor
    cut_chunks: Tensor
    slash_words: Tensor
    vertical_words: Tensor
    columns: Tensor
    counts: Tensor
    work: WorkList


def plan(
    verticals: Tensor, slashes: Tensor, first_valid: Tensor | None, rows: int, *, tile_rows: int, tile_keys: int
) -> Plan:
    """Return the plan for the last ``rows`` of n columns on lines bool ``[Hq, n]``, without columns before
    ``first_valid`` int64 ``[Hq]``.
    """
    verticals, slashes = verticals.contiguous(), slashes.contiguous()
    heads, total = slashes.shape
    tiles = -(-rows // tile_rows)
    plain, cut = _chunks(slashes, tile_rows, tile_keys)
    standing = torch.arange(tiles, device=slashes.device) * tile_rows + total - rows  # column of each tile's first row
    oldest = torch.zeros(1, dtype=torch.long, device=slashes.device) if first_valid is None else first_valid
    # A chunk is used while its last key is in the store: distance <= column of the tile's last row - first held column.
    farthest = (standing + tile_rows - 1 - oldest[:, None]).expand(heads, -1).clamp(min=-1)
    counted = [
        torch.searchsorted(each, (farthest.int() << LENGTH_BITS) + (1 << LENGTH_BITS) - 1, right=True)
        for each in (plain, cut)
    ]
    read = verticals
    if first_valid is not None:
        read = verticals & (torch.arange(total, device=slashes.device) >= first_valid[:, None])
    columns = compacted_rows(read, total, _NEVER)
    last = (standing + tile_rows - 1).int().expand(heads, -1).contiguous()
    counted.append(torch.searchsorted(columns, last, right=True))
    counts = torch.stack(counted).view(3, -1).int()
    steps = counts[0] + counts[1] + (counts[2] + tile_keys - 1).div(tile_keys, rounding_mode="floor")
    return Plan(
        plain_chunks=plain,
        cut_chunks=cut,
        slash_words=flag_words(slashes.flip(1)),
        vertical_words=flag_words(verticals),
        columns=columns,
        counts=counts,
        work=work_list(steps),
    )


def _chunks(slashes: Tensor, tile_rows: int, tile_keys: int) -> tuple[Tensor, Tensor]:
    """Return (plain, cut) chunks, ascending, padded with a distance that no tile reaches.

    The key at distance b before the last row of a tile has the offsets b - tile_rows + 1 to b. Distances that meet a
    chosen offset form runs, and each run is cut into chunks from its near end.
    """
    total = slashes.shape[1]
    length = total + tile_rows - 1
    below = pad(slashes.cumsum(1, dtype=torch.int32), (1, tile_rows + tile_keys))  # chosen offsets before x
    below[:, total + 1 :] = below[:, total : total + 1]
    distance = torch.arange(length, dtype=torch.int32, device=slashes.device)
    before = pad(below[:, :total], (tile_rows - 1, 0))  # chosen offsets before distance - tile_rows + 1
    reached = below[:, 1 : length + 1] > before
    starts_run = reached.clone()
    starts_run[:, 1:] &= ~reached[:, :-1]
    run = (starts_run * distance).cummax(1).values
    begins = reached & ((distance - run) % tile_keys == 0)
    # Runs are at least tile_rows long and end before the next begins; only a last chunk of a run is not full.
    capacity = -(-length // tile_keys) + length // (tile_rows + 1) + 2
    starts = compacted_rows(begins, capacity + 1, _NEVER >> LENGTH_BITS)
    owned = (starts[:, 1:] - starts[:, :-1]).clamp(max=tile_keys)
    starts = starts[:, :-1]
    real = starts < length
    # Its cells are the offsets from distance - tile_rows + 1 to distance + tile_keys - 1.
    at = starts.clamp(max=length - 1).long()
    low = (at - tile_rows + 1).clamp(min=0)
    cells = below.gather(1, at + tile_keys) - below.gather(1, low)
    whole = real & (cells == tile_rows + tile_keys - 1)
    entries = (starts << LENGTH_BITS) | owned
    # Sorting moves the padding after the chunks of the kind.
    plain = entries.masked_fill(~whole, _NEVER).sort(1).values
    cut = entries.masked_fill(whole | ~real, _NEVER).sort(1).values
    return plain, cut
