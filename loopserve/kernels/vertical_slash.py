"""Compute attention of new queries on the exact union of vertical and slash lines, which differ per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check, check_lines
from loopserve.kernels.dense_attention import dense_attention_torch
from loopserve.kernels.gpu import limits
from loopserve.kernels.masked import (
    MASKED,
    additive_mask,
    fused,
    masked_attention,
    merge,
    per_query_head,
    query_columns,
    serves,
    settle,
    visible,
)
from loopserve.kernels.native import attention
from loopserve.kernels.paged import Rows, check_paged, gathered

_OPERATION = backend.operation(
    "vertical_slash",
    torch="vertical_slash",
    cpu="native.attention",
    triton="gpu.vertical_slash",
    limits={"cpu": attention.limit, "triton": limits.lines},
)


def vertical_slash(
    queries: Tensor,
    keys: Rows,
    values: Rows,
    verticals: Tensor,
    slashes: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output ``[Hq, Tq, D]`` and log-sum-exp float32 ``[Hq, Tq]`` over the cells of the chosen lines.

    The queries are the last Tq columns. verticals, slashes: bool ``[Hq, Tk]``, by key column and by offset (query
    column minus key column). A cell on two lines counts once. A head with every slash is dense. A row without a cell
    gets output 0 and log-sum-exp -inf. Keys and values may lie in the blocks of a paged cache. Raises ValueError for
    arguments that do not fit together.
    """
    check("vertical_slash", queries, keys, values, first_valid=first_valid)
    check_paged("vertical_slash", keys, values)
    check_lines("vertical_slash", verticals, slashes, queries.shape[0], keys.shape[1], queries.device)
    found: tuple[Tensor, Tensor] = _OPERATION(
        queries, keys, values, verticals, slashes, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    return found


def line_mask(verticals: Tensor, slashes: Tensor, columns: Tensor) -> Tensor:
    """Return the cells of the lines that queries at ``columns`` ``[Tq]`` see: bool ``[Hq, Tq, Tk]``."""
    offsets = columns[:, None] - torch.arange(verticals.shape[1], device=verticals.device)
    return (verticals[:, None] | slashes[:, offsets.clamp(min=0)]) & (offsets >= 0)


def vertical_slash_reference(
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
    """Define line attention: masked attention under a mask of the cells of the lines."""
    keys, values = gathered(keys, values)
    columns = query_columns(queries, keys)
    seen = per_query_head(visible(columns, keys.shape[1], first_valid=first_valid), queries.shape[0])
    mask = line_mask(verticals, slashes, columns) & seen
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)


# Measured relative cost of a cell by rows per tile: taller tiles multiply faster but read more keys per slash.
_TILES = {64: 1.25, 128: 1.1, 256: 1.0}
_CELLS = 1 << 18  # cells per step, so that mask and gathered keys fit the cache
_ROWS = 512  # rows per step over the copied verticals
_CHUNK = 128  # rows per step where the fused kernel cannot serve


def vertical_slash_torch(
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
    """Compute line attention in two parts per head, merged by their log-sum-exps.

    Slashes: each tile of rows gathers the keys in the ranges that its offsets reach, without those of chosen verticals.
    Which offsets are chosen depends on row minus key alone, so one small mask serves every tile. Verticals: their keys are
    copied together once per head and attended by all rows. Together the parts compute each cell of the union once.

    Computes in float32, since the fused CPU kernel is no faster in half precision.
    """
    keys, values = gathered(keys, values)
    heads, rows = queries.shape[:2]
    group = heads // keys.shape[0]
    starts = [0] * keys.shape[0] if first_valid is None else first_valid.tolist()
    output = queries.new_zeros(heads, rows, values.shape[2])
    lse = torch.full((heads, rows), float("-inf"), dtype=torch.float32, device=queries.device)
    for owner, start in enumerate(starts):
        # Filler columns are cut off. Offsets do not change, and rows in the filler see no key.
        own_keys, own_values = keys[owner, start:].float(), values[owner, start:].float()
        held = len(own_keys)
        seeing = slice(max(0, rows - held), rows)
        for head in range(owner * group, (owner + 1) * group) if held else ():
            part = queries[head, seeing].float(), own_keys, own_values
            lines = verticals[head, start:], slashes[head, :held]
            found, found_lse = _one_head(*part, *lines, scaling, softcap)
            output[head, seeing], lse[head, seeing] = found.to(output.dtype), found_lse
    return output, lse


def _one_head(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return output ``[Tq, D]`` and log-sum-exp ``[Tq]`` of queries ``[Tq, D]`` over keys ``[Tk, D]`` on lines
    ``[Tk]``, all float32.
    """
    if bool(slashes.all()):  # every cell
        output, lse = dense_attention_torch(queries[None], keys[None], values[None], scaling=scaling, softcap=softcap)
        assert lse is not None
        return output[0], lse[0]
    if not serves(values, queries.shape[1], softcap):
        return _by_mask(queries, keys, values, verticals, slashes, scaling, softcap)
    chosen = verticals.nonzero().flatten()
    parts = []
    if bool(slashes.any()):
        parts.append(_on_slashes(queries, keys, values, verticals, slashes, scaling))
    if len(chosen):
        parts.append(_on_verticals(queries, keys, values, chosen, scaling))
    if not parts:
        return torch.zeros_like(queries), queries.new_full(queries.shape[:1], float("-inf"))
    return settle(*(parts[0] if len(parts) == 1 else merge(*parts)))


@dataclass(frozen=True)
class _Reach:
    """Hold the keys that a tile of rows needs for its slashes, nearest first: key minus first row of the tile, int64
    ``[W]``.
    """

    tile: int
    steps: Tensor

    @classmethod
    def best(cls, slashes: Tensor, rows: int) -> _Reach:
        """Return the tile height with the lowest estimated cost."""
        offsets = slashes.nonzero().flatten()
        found = [cls._of(offsets, tile) for tile in _TILES]
        return min(found, key=lambda each: len(each.steps) * _TILES[each.tile] * max(1, each.tile / rows))

    @classmethod
    def _of(cls, offsets: Tensor, tile: int) -> _Reach:
        # Row i of the tile has offset d at step i - d. So each offset needs the steps from -d to tile - 1 - d.
        reached = torch.zeros(int(offsets[-1]) + tile + 1, dtype=torch.int32, device=offsets.device)
        reached[offsets] += 1
        reached[offsets + tile] -= 1
        return cls(tile, tile - 1 - reached.cumsum(0)[:-1].nonzero().flatten())

    def mask(self, slashes: Tensor) -> Tensor:
        """Return the additive mask float32 ``[tile, W]``: 0 where row minus step is a chosen offset."""
        bias = torch.full((len(slashes) + 2 * self.tile,), MASKED, dtype=torch.float32, device=slashes.device)
        bias[self.tile : -self.tile].masked_fill_(slashes, 0.0)
        row = torch.arange(self.tile, device=slashes.device)
        return bias[row[:, None] - self.steps + self.tile]


def _on_slashes(
    queries: Tensor, keys: Tensor, values: Tensor, verticals: Tensor, slashes: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attend to the cells of the slashes that are on no chosen vertical."""
    rows, total = len(queries), len(keys)
    reach = _Reach.best(slashes, rows)
    tile, pattern = reach.tile, reach.mask(slashes)
    per_key = additive_mask(verticals)
    output = torch.empty_like(queries)
    lse = queries.new_empty(rows)
    start = 0
    while start < rows:
        height = min(tile, rows - start)
        tiles = max(1, min((rows - start) // tile, _CELLS // (tile * len(reach.steps))))
        end = start + tiles * height
        first = total - rows + start + tile * torch.arange(tiles, device=keys.device)  # column of each tile's first row
        # Steps run from near to far. Those before column 0 for the last tile are cut off, for other tiles they are
        # masked.
        width = int((reach.steps >= -int(first[-1])).sum())
        if width == 0:
            output[start:end], lse[start:end] = 0.0, MASKED
            start = end
            continue
        columns = first[:, None] + reach.steps[:width]
        inside = columns.clamp(0, total - 1)
        bias = per_key[inside].masked_fill_(columns < 0, MASKED)
        flat = inside.flatten()
        found, found_lse = fused(
            queries[start:end].view(tiles, 1, height, -1),
            keys.index_select(0, flat).view(tiles, 1, width, -1),
            values.index_select(0, flat).view(tiles, 1, width, -1),
            scaling=scaling,
            mask=(pattern[:height, :width] + bias[:, None])[:, None],
        )
        output[start:end], lse[start:end] = found.reshape(end - start, -1), found_lse.flatten()
        start = end
    return output, lse


def _on_verticals(
    queries: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attend to the chosen columns, causal."""
    history = len(keys) - len(queries)
    packed_keys, packed_values = keys.index_select(0, chosen), values.index_select(0, chosen)
    output = torch.zeros_like(queries)
    lse = queries.new_full(queries.shape[:1], MASKED)
    for start in range(0, len(queries), _ROWS):
        end = min(start + _ROWS, len(queries))
        seen = int((chosen < history + end).sum())
        if seen == 0:
            continue
        mask = None
        if int(chosen[seen - 1]) > history + start:  # some column lies after the first row
            rows = torch.arange(history + start, history + end, device=keys.device)
            mask = additive_mask(chosen[:seen] > rows[:, None])
        part = queries[start:end], packed_keys[:seen], packed_values[:seen]
        found, found_lse = fused(*(each[None, None] for each in part), scaling=scaling, mask=mask)
        output[start:end], lse[start:end] = found[0, 0], found_lse[0, 0]
    return output, lse


def _by_mask(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute under a full mask, some rows at a time, where the fused kernel lacks support (softcap, other value
    sizes).

    Costs as much as dense attention.
    """
    columns = torch.arange(len(keys) - len(queries), len(keys), device=keys.device)
    outputs, lses = [], []
    for rows, where in zip(torch.split(queries, _CHUNK), torch.split(columns, _CHUNK), strict=True):
        end = int(where[-1]) + 1
        mask = line_mask(verticals[None, :end], slashes[None, :end], where)
        found, lse = masked_attention(
            rows[None], keys[None, :end], values[None, :end], mask, scaling=scaling, softcap=softcap
        )
        outputs.append(found[0])
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses)
