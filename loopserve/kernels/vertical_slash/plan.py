"""List on the device which keys each tile of rows reads.

The keys that a tile of rows needs for its slashes depend only on their distance before the first row of the tile. So
the chunks of keys are listed once per head, nearest first and unaligned, and a tile reads those that begin inside the
store. Its verticals are the chosen columns in ascending order, up to its last row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.gpu.compact import compacted_rows
from loopserve.kernels.gpu.words import flag_words
from loopserve.kernels.gpu.work import WorkList, work_list

LENGTH_BITS = 8  # a chunk is encoded as its distance, with the number of keys it owns in the low bits
_NEVER = 1 << 30


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
