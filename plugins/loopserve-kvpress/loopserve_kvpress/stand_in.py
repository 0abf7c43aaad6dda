"""Replace a transformers attention module for scorers, as far as queries and keys allow.

kvpress computes queries as ``q_proj(hidden_states)`` and rotates them itself. So the hidden states passed here are the
queries of the call, rotated back to position 0, and ``q_proj`` returns them unchanged. True hidden states are not
available. Any other attribute of the module is refused by name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from loopserve import AttentionInputs, LayerParts, PolicyError

_PROBED = (0, 1, 300)


class Same:
    """Return the input unchanged. ``weight`` is the identity, for scorers that multiply by it."""

    def __init__(self, width: int, like: Tensor) -> None:
        self._width, self._like = width, like

    def __call__(self, states: Tensor) -> Tensor:
        return states

    @property
    def weight(self) -> Tensor:
        return torch.eye(self._width, dtype=self._like.dtype, device=self._like.device)


class StandInModule:
    """Replace one attention module in one call. A scorer sees ``kv_heads`` of its heads."""

    def __init__(self, inputs: AttentionInputs, kv_heads: int, reads_queries: bool) -> None:
        heads, dim = kv_heads * inputs.group, inputs.keys.shape[2]
        self.layer_idx = inputs.layer.index
        self.head_dim = dim
        self.num_key_value_groups = inputs.group
        self.scaling = inputs.scaling
        self.training = False
        self.config = SimpleNamespace(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=dim,
            num_hidden_layers=len(inputs.compressor_layers) or inputs.layer.index + 1,
        )
        if reads_queries:
            self._inputs = inputs
            self.q_proj = Same(heads * dim, inputs.queries)
            self.rotary_emb = self._rotation_of_what_comes

    def _rotation_of_what_comes(self, vectors: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin ``[1, n, D]`` of future positions.

        A scorer counts positions from the first query of the call. Those of a later turn follow the whole session.
        """
        before = self._inputs.length - self._inputs.new_tokens
        return cos_and_sin(parts_of(self._inputs), position_ids[0] + before, vectors)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the scorer asks the attention module for {name!r}, which loopserve-kvpress cannot give: there are "
            "config, head_dim, layer_idx, scaling and, with reads_queries, q_proj and rotary_emb"
        )


def parts_of(inputs: AttentionInputs) -> LayerParts:
    if inputs.layer.parts is None:
        raise PolicyError("loopserve-kvpress: this layer cannot turn queries back; set reads_queries: false")
    return inputs.layer.parts


def cos_and_sin(parts: LayerParts, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotation by halves at positions ``[n]``: cos and sin ``[1, n, D]`` as transformers' rotary modules
    return them.
    """
    dim = like.shape[-1]
    probe = torch.zeros(1, len(positions), dim, dtype=like.dtype, device=like.device)
    probe[..., : dim // 2] = 1  # x * cos + rotate_half(x) * sin of (1, 0) is (cos, sin)
    turned = parts.rotate(probe, positions)
    cos, sin = turned[..., : dim // 2], turned[..., dim // 2 :]
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def rotates_by_halves(parts: LayerParts, dim: int) -> bool:
    """Return whether a layer rotates as kvpress's scorers assume: x * cos + rotate_half(x) * sin over all channels."""
    vectors = torch.randn(
        1, len(_PROBED), dim, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    positions = torch.tensor(_PROBED, dtype=torch.long, device="cpu")
    cos, sin = cos_and_sin(parts, positions, vectors)
    halves = torch.cat([-vectors[..., dim // 2 :], vectors[..., : dim // 2]], dim=-1)
    return torch.allclose(vectors * cos + halves * sin, parts.rotate(vectors, positions), atol=1e-3)
