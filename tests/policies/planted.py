"""Scripted conversations in which a few rows look at a few planted tokens and all else is faint noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYERS, KV_HEADS, GROUP, DIM, LENGTH = 2, 2, 2, 64, 400
TOPICS = 8  # first channels, free of noise: a token that is not looked at gets no attention by its topic
STRENGTH = 3.0  # a look at a topic gives its tokens a logit of 9
NOISE = 0.3


class Script:
    """Queries and keys by position; each topic has a channel of its own."""

    def __init__(self, seed: int = 0, length: int = LENGTH) -> None:
        source = torch.Generator().manual_seed(seed)
        self.keys = NOISE * torch.randn(LAYERS, KV_HEADS, length, DIM, generator=source)
        self.queries = NOISE * torch.randn(LAYERS, KV_HEADS * GROUP, length, DIM, generator=source)
        self.keys[..., :TOPICS] = 0.0
        self.queries[..., :TOPICS] = 0.0

    def tell(self, topic: int, positions: Sequence[int]) -> None:
        """The keys at these positions are about a topic."""
        self.keys[:, :, list(positions), topic] += STRENGTH

    def look(self, topic: int, positions: Sequence[int], layers: Sequence[int] = range(LAYERS)) -> None:
        """The queries at these positions look for a topic."""
        for layer in layers:
            self.queries[layer, :, list(positions), topic] += STRENGTH


def kept(selection_indices: Tensor, positions: Sequence[int]) -> bool:
    """Whether every head keeps all these positions."""
    return all(set(positions) <= set(row.tolist()) for row in selection_indices)


def lost(selection_indices: Tensor, positions: Sequence[int]) -> bool:
    """Whether no head keeps them all; the budget left over by what is planted falls on tokens at random."""
    return not any(set(positions) <= set(row.tolist()) for row in selection_indices)
