"""Choose lines by counts and masses, as several prefill policies do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loopserve.core.policy.interfaces import AttentionInputs


def sink_lines(inputs: AttentionInputs, count: int) -> Tensor:
    """Return the verticals of the first ``count`` stored pairs of each head: bool ``[Hq, Tk]``. Filler columns are skipped."""
    heads = inputs.queries.shape[0]
    columns = torch.arange(inputs.total_tokens, device=inputs.device).expand(heads, -1)
    if inputs.first_valid is None:
        return columns < count
    start = inputs.first_valid.repeat_interleave(inputs.group)[:, None]
    return (columns >= start) & (columns < start + count)


def scaled_count(most: int, share: float | None, least: int, total_tokens: int) -> int:
    """Return how many lines to take: ``share`` of the stored pairs, rounded up, from ``least`` to ``most``; None takes ``most``."""
    return most if share is None else min(most, max(least, math.ceil(share * total_tokens)))


def lines_counted_apart(
    vertical: Tensor, slash: Tensor, new_tokens: int, share: float, forced: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return lines by mass per length until their masses sum to ``share`` of the total. Cells of two lines count twice.

    vertical, slash float ``[Hq, n]``, the masses of all lines on some rows (each kind sums to the total). forced bool ``[Hq, n]``
    each, taken first. Ties: verticals first, then the lower line. Returns verticals and slashes, bool.
    """
    total = vertical.shape[1]
    line = torch.arange(total, device=vertical.device)
    length = (new_tokens - (line - (total - new_tokens)).clamp(min=0)).clamp(min=1)
    mass = torch.cat([vertical, slash], dim=1)
    worth = (mass / torch.cat([length, length])).masked_fill(torch.cat(forced, dim=1), float("inf"))
    order = worth.argsort(dim=1, descending=True, stable=True)
    ranked = mass.gather(1, order)
    before = ranked.cumsum(1) - ranked
    taken = (before < share * vertical.sum(1, keepdim=True)) | worth.gather(1, order).isinf()
    chosen = torch.zeros_like(taken).scatter_(1, order, taken)
    return chosen[:, :total], chosen[:, total:]


def heaviest(mass: Tensor, sizes: Tensor, forced: Tensor) -> Tensor:
    """Return the ``sizes`` ``[Hq]`` lines of most mass ``[Hq, n]``, the forced ones first: bool ``[Hq, n]``. Ties: the lowest
    first.
    """
    order = mass.masked_fill(forced, float("inf")).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(mass.shape[1], device=mass.device)
    taken = ranks < torch.maximum(sizes[:, None], forced.sum(-1, keepdim=True))
    return torch.zeros_like(forced).scatter_(1, order, taken)
