"""Compute the attention that stored pairs receive."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.policy.interfaces import AttentionInputs

_ROWS = 256  # rows whose attention over all keys is in memory at once


def attention_over(inputs: AttentionInputs, columns: Tensor) -> Tensor:
    """Return the last query's softmax over some columns, bool ``[Hkv, Tk]``, mean over the group: float32 ``[Hkv, Tk]``."""
    heads = len(columns)
    inputs.record.read("scoring", int(columns.sum()) * inputs.keys.shape[2] * inputs.keys.element_size())
    queries = inputs.queries[:, -1].view(heads, inputs.group, -1).float()
    logits = queries @ inputs.keys.float().transpose(1, 2) * inputs.scaling
    if inputs.softcap:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    spread: Tensor = logits.masked_fill(~columns[:, None], float("-inf")).softmax(-1).mean(1)
    return spread


def received(inputs: AttentionInputs) -> Tensor:
    """Return the attention that each stored pair gets from all queries of this call, mean over the group: float32 ``[Hkv, Tk]``."""
    total = torch.zeros(inputs.keys.shape[:2], dtype=torch.float32, device=inputs.keys.device)
    for rows in torch.arange(inputs.new_tokens, device=inputs.keys.device).split(_ROWS):
        total += inputs.token_scores(inputs.queries[:, rows], inputs.columns[rows], over_rows="sum")
    return total
