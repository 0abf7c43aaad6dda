"""Describe an attention layer to a policy, and the parts of it that a policy may use.

Depends on no model family: the bridge supplies ``LayerParts``, or says why it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from torch import Tensor


class LayerType(StrEnum):
    FULL = "full_attention"
    SLIDING = "sliding_attention"
    CHUNKED = "chunked_attention"  # attends to the pairs of its own chunk of the conversation (llama 4)
    RECURRENT = "recurrent"  # linear attention, a state space or a convolution: keeps a state and no pairs
    NONE = "no_attention"  # keeps nothing between two passes


class Need(StrEnum):
    """Name what a policy uses beyond queries, keys and values. A stack is refused where a layer does not have it."""

    ROTARY = "rotary"  # to turn queries back to before their position, and on to later ones
    OUTPUT_WEIGHT = "output_weight"  # the weight that maps a head's output into the model
    FULL_HISTORY = "full_history"  # every pair of the conversation: the decode policy beside it must not evict


class LayerParts(Protocol):
    """Give a policy parts of the layer itself; supplied by the bridge (``models.layer_parts``)."""

    def lacks(self, need: Need) -> str | None:
        """Return why this layer does not have ``need``, or None if it has it."""

    def rotate(self, vectors: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Return vectors ``[H, T, D]`` rotated to ``positions`` int64 ``[T]``, or ``back`` from them, as the model rotates."""

    def output_weight(self) -> Tensor:
        """Return ``[Hq, D, E]``, which maps the output of each query head into the model's width E."""


@dataclass(frozen=True)
class LayerSpec:
    """Describe one layer of a model. ``index`` is its place in the model's list of layers; without pairs it has 0 heads."""

    index: int
    type: LayerType
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None  # tokens of the window of a sliding layer, of the chunk of a chunked one
    parts: LayerParts | None = field(default=None, compare=False, repr=False)
    value_dim: int | None = None  # head size of the values where it is not that of the keys
    reads: int | None = None  # index of the layer whose pairs it attends to; None = its own
    recurrent: int = 0  # recurrent or convolution states that it keeps, beside its pairs or without any
    state_bytes: int = 0  # of these states, for one conversation
    repeatable: bool = True  # rows of a turn can be computed again at their own positions
    latent: bool = False  # the model puts a latent into its cache; what is stored are the pairs expanded from it

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def holds_pairs(self) -> bool:
        """Return whether the layer attends to stored pairs."""
        return self.type not in (LayerType.RECURRENT, LayerType.NONE)

    @property
    def pair_width(self) -> int:
        """Return the numbers of one head's key and value together."""
        return self.head_dim + (self.head_dim if self.value_dim is None else self.value_dim)

    def lacks(self, need: Need) -> str | None:
        """Return why a policy cannot have ``need`` here, or None if it can."""
        if need is Need.FULL_HISTORY:
            return None  # concerns two policies and not the layer
        return "this model's bridge does not supply it" if self.parts is None else self.parts.lacks(need)
