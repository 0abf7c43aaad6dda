"""Choose key blocks for blocks of queries: shared by the policies that compute whole blocks.

Query blocks count from the first new row, key blocks from column 0 (as ``BlockPattern`` does), so a block of queries may end in the
middle of a key block. Filler columns of a head that holds fewer pairs are in no block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.policy.interfaces import AttentionInputs


def block_ends(inputs: AttentionInputs, block: int) -> Tensor:
    """Return the last column that each query block sees: int64 ``[blocks]``."""
    ends = torch.arange(block, inputs.new_tokens + block, block, device=inputs.keys.device).clamp(max=inputs.new_tokens)
    return ends + (inputs.total_tokens - inputs.new_tokens) - 1


def visible_blocks(inputs: AttentionInputs, block: int) -> Tensor:
    """Return the key blocks that hold a pair which some query of a block sees: bool ``[Hq, query blocks, key blocks]``."""
    starts = torch.arange(0, inputs.total_tokens, block, device=inputs.keys.device)
    causal = starts <= block_ends(inputs, block)[:, None]
    last = (starts + block).clamp(max=inputs.total_tokens)
    if inputs.first_valid is None:
        return causal.expand(inputs.queries.shape[0], -1, -1)
    real = last > inputs.first_valid.repeat_interleave(inputs.group)[:, None]
    return causal & real[:, None]


def pooled(vectors: Tensor, block: int, counted: Tensor | None = None) -> Tensor:
    """Return the mean of each block of ``[H, T, D]``, over the ``counted`` rows bool ``[H, T]``: float32 ``[H, blocks, D]``."""
    heads, total, width = vectors.shape
    counted = torch.ones(heads, total, dtype=torch.bool, device=vectors.device) if counted is None else counted
    short = -total % block
    rows = pad(vectors.float() * counted[..., None], (0, 0, 0, short)).view(heads, -1, block, width)
    counts = pad(counted, (0, short)).view(heads, -1, block).sum(2).clamp(min=1)
    return rows.sum(2) / counts[..., None]


def block_attention(inputs: AttentionInputs, block: int, queries: Tensor) -> Tensor:
    """Return the softmax of pooled queries ``[Hq, query blocks, D]`` over the pooled keys they see: ``[Hq, query blocks, key
    blocks]``.
    """
    keys = pooled(inputs.keys, block, inputs.holds).repeat_interleave(inputs.group, dim=0)
    logits = capped(queries @ keys.transpose(1, 2) * inputs.scaling, inputs.softcap)
    seen = visible_blocks(inputs, block)[:, -queries.shape[1] :]
    spread: Tensor = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return spread


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def largest_share(mass: Tensor, share: float, least: int = 1) -> Tensor:
    """Return the fewest entries of each last dimension that hold ``share`` of its sum, at least ``least``: bool like ``mass``.

    Entries that are not positive are never among them. Equal entries: the lowest first.
    """
    order = mass.argsort(dim=-1, descending=True, stable=True)
    before = mass.gather(-1, order).cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    # Rounding must not add one entry more than the share needs. A share of 1 takes every entry, however small.
    wanted = share * mass.sum(-1, keepdim=True) * (1 - 1e-6 if share < 1 else 2)
    rank = torch.arange(mass.shape[-1], device=mass.device)
    taken = (before < wanted) | (rank < least)
    return torch.zeros_like(taken).scatter_(-1, order, taken) & (mass > 0)


def first_and_last(inputs: AttentionInputs, block: int) -> Tensor:
    """Return the block of each head's first pair, and those of the queries' own columns: bool ``[Hq, query blocks, key blocks]``."""
    heads = inputs.queries.shape[0]
    ends = block_ends(inputs, block)
    chosen = torch.zeros(heads, len(ends), -(-inputs.total_tokens // block), dtype=torch.bool, device=ends.device)
    first = torch.zeros(heads, dtype=torch.long, device=ends.device)
    if inputs.first_valid is not None:
        first = inputs.first_valid.repeat_interleave(inputs.group)
    chosen[torch.arange(heads, device=ends.device), :, first // block] = True
    chosen[:, torch.arange(len(ends), device=ends.device), ends // block] = True
    return chosen
