"""What decoding attends to now, and how the current query's attention spreads over it."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.policy.interfaces import AttentionInputs

_ROWS = 256  # rows whose attention over all keys is held at once


def attended(inputs: AttentionInputs) -> Tensor:
    """Columns that the current step attends to: bool ``[Hkv, Tk]``."""
    selection = inputs.selection
    if selection is None:
        return inputs.holds
    positions = inputs.positions.expand(inputs.keys.shape[0], -1)
    chosen = torch.zeros(len(positions), inputs.length, dtype=torch.bool, device=positions.device)
    if selection.indices.shape[1]:
        width = selection.indices.shape[1]
        real = torch.arange(width, device=positions.device) >= (width - selection.lengths)[:, None]
        chosen.scatter_(1, selection.indices.clamp(min=0), real)
        # Filler points at position 0 and may have written over it: set what is really chosen once more.
        chosen[:, 0] = (selection.indices == 0).any(1)
    chosen[:, selection.boundary :] = True
    return chosen.gather(1, positions.clamp(min=0)) & inputs.holds


def attention_over(inputs: AttentionInputs, columns: Tensor) -> Tensor:
    """The last query's softmax over some columns, bool ``[Hkv, Tk]``, mean over the group: float32 ``[Hkv, Tk]``."""
    heads = len(columns)
    inputs.record.read("scoring", int(columns.sum()) * inputs.keys.shape[2] * inputs.keys.element_size())
    queries = inputs.queries[:, -1].view(heads, inputs.group, -1).float()
    logits = queries @ inputs.keys.float().transpose(1, 2) * inputs.scaling
    if inputs.softcap:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    spread: Tensor = logits.masked_fill(~columns[:, None], float("-inf")).softmax(-1).mean(1)
    return spread


def received(inputs: AttentionInputs) -> Tensor:
    """Attention that each stored pair gets from all queries of this call, mean over the group: float32 ``[Hkv, Tk]``."""
    total = torch.zeros(inputs.keys.shape[:2], dtype=torch.float32, device=inputs.keys.device)
    for rows in torch.arange(inputs.new_tokens, device=inputs.keys.device).split(_ROWS):
        total += inputs.token_scores(inputs.queries[:, rows], inputs.columns[rows], over_rows="sum")
    return total
