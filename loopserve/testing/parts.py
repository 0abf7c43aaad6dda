"""Stand in for the parts of a layer: plain rotary positions and a random output weight."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.policy.layers import LayerParts, Need

_BASE = 10_000.0


class PlainParts(LayerParts):
    """Rotate by halves as Llama does; the output weight is drawn from a seed."""

    def __init__(self, query_heads: int, head_dim: int, width: int | None = None, seed: int = 0) -> None:
        """Take the width of the model; that of all heads together by default."""
        source = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(
            query_heads, head_dim, width or query_heads * head_dim, generator=source, dtype=torch.float32, device="cpu"
        )

    def lacks(self, need: Need) -> str | None:
        return None

    def rotate(self, vectors: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        half = vectors.shape[-1] // 2
        speeds = _BASE ** (-torch.arange(half, dtype=torch.float32, device=vectors.device) / half)
        angles = positions.float()[:, None] * speeds * (-1 if back else 1)
        cos, sin = angles.cos(), angles.sin()
        first, second = vectors[..., :half], vectors[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def output_weight(self) -> Tensor:
        return self._weight
