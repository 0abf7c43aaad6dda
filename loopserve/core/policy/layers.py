"""What a policy is told of an attention layer, and what it may ask of it.

Knows no model family: the bridge supplies ``LayerParts``, or says why it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class LayerType(StrEnum):
    FULL = "full_attention"
    SLIDING = "sliding_attention"


class Need(StrEnum):
    """What a policy may need beyond queries, keys and values. A stack is refused where it cannot be had."""

    ROTARY = "rotary"  # to turn queries back to before their position, and on to later ones
    OUTPUT_WEIGHT = "output_weight"  # the weight that maps a head's output into the model
    FULL_HISTORY = "full_history"  # every pair of the conversation: the decode policy beside it must not evict


class LayerParts(Protocol):
    """What of a layer itself a policy may use; supplied by the bridge (``models.layer_parts``)."""

    def lacks(self, need: Need) -> str | None:
        """Why this layer cannot give ``need``; None if it can."""

    def rotate(self, vectors: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Vectors ``[H, T, D]`` rotated to ``positions`` int64 ``[T]``, or ``back`` from them, as the model rotates."""

    def output_weight(self) -> Tensor:
        """``[Hq, D, E]``: maps the output of each query head into the model's width E."""


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer of a model. ``index`` is its place in the model's list of layers."""

    index: int
    type: LayerType
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    parts: LayerParts | None = field(default=None, compare=False, repr=False)

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    def lacks(self, need: Need) -> str | None:
        """Why a policy cannot have ``need`` here; None if it can."""
        if need is Need.FULL_HISTORY:
            return None  # a matter between two policies, not of the layer
        return "this model's bridge does not supply it" if self.parts is None else self.parts.lacks(need)
