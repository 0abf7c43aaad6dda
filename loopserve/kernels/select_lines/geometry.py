"""Compute the cost of each line given the lines already chosen, batched over heads.

The block has m new rows over n columns, with p = n - m columns of history. Vertical j holds the cells (i, j), slash d
the cells (i, p + i - d). Line x of either kind has m - max(0, x - p) cells. Vertical j and slash d share one cell if p
<= j + d < n, else none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def line_lengths(new_tokens: int, total: int, device: torch.device | None = None) -> Tensor:
    """Return the number of cells of line x in the block, float64 ``[n]``."""
    line = torch.arange(total, dtype=torch.float64, device=device)
    return new_tokens - (line - (total - new_tokens)).clamp(min=0)


def cells_added(chosen: Tensor, new_tokens: int) -> Tensor:
    """Return how many cells each line adds to the union of the chosen lines bool ``[H, 2, n]``: float64 ``[H, 2, n]``."""
    total = chosen.shape[2]
    history = total - new_tokens
    below = pad(chosen.flip(1).cumsum(2), (1, 0))  # chosen lines of the other kind before x
    # Line x crosses the others from max(0, p - x) to n - 1 - x.
    upto = below.flip(2)[:, :, :total]
    first = torch.zeros_like(upto)
    first[:, :, :history] = below[:, :, 1 : history + 1].flip(2)
    return line_lengths(new_tokens, total, chosen.device) - (upto - first)


def offsets_computed(slashes: Tensor, tile: int) -> Tensor:
    """Return which offsets a tile of rows computes for chosen slashes bool ``[..., n]``: bool ``[..., n + tile - 1]``.

    Entry o is the key column o - (tile - 1) before the first row of the tile. Slash d needs the entries d to d + tile -
    1.
    """
    below = pad(pad(slashes, (0, tile - 1)).cumsum(-1), (tile, 0))  # slashes up to and including entry o - tile
    return below[..., tile:] > below[..., :-tile]


def keys_added(chosen: Tensor, new_tokens: int, tile: int) -> Tensor:
    """Return how many additional keys per tile, averaged over the block, a kernel computes for each line: float64 ``[H,
    2, n]``.
    """
    total = chosen.shape[2]
    lengths = line_lengths(new_tokens, total, chosen.device) / new_tokens
    span = torch.cat([torch.ones(tile - 1, dtype=lengths.dtype, device=chosen.device), lengths])
    missing = pad((span * ~offsets_computed(chosen[:, 1], tile)).cumsum(-1), (1, 0))
    slash = missing[:, tile:] - missing[:, :-tile]
    # Rounding leaves sums that should be 0 slightly off. A real cost is at least one row of one key.
    slash = slash.masked_fill(slash < 0.5 / new_tokens, 0.0)
    return torch.stack([lengths.expand_as(slash), slash], dim=1)


def total_cost(chosen: Tensor, new_tokens: int, tile: int | None) -> Tensor:
    """Return the cost float64 ``[H]`` of the chosen lines ``[H, 2, n]``: cells of their union, or keys per tile if
    ``tile`` is given.
    """
    total = chosen.shape[2]
    lengths = line_lengths(new_tokens, total, chosen.device)
    if tile is None:
        slashes_only = torch.stack([torch.zeros_like(chosen[:, 0]), chosen[:, 1]], dim=1)
        added = cells_added(slashes_only, new_tokens)[:, 0]
        return (chosen[:, 1] * lengths).sum(-1) + (chosen[:, 0] * added).sum(-1)
    lengths = lengths / new_tokens
    span = torch.cat([torch.ones(tile - 1, dtype=lengths.dtype, device=chosen.device), lengths])
    return (chosen[:, 0] * lengths).sum(-1) + (offsets_computed(chosen[:, 1], tile) * span).sum(-1)
