"""Two small policies that keep every promise; the broken ones are these with one thing changed."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier, Selections, Step
from loopserve.core.policy.patterns import AttentionPattern
from loopserve.core.policy.scoring import ScoredCompressor, ScoredState
from loopserve.kernels.masked import masked_attention


class Named:
    """Gives each class a name made from its own, and no paper, unless it says otherwise."""

    name: ClassVar[str]
    paper: ClassVar[str]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        if "paper" not in cls.__dict__:
            cls.paper = ""


class MaskPattern(AttentionPattern):
    """A pattern that is nothing but its mask, bool ``[Hq, Tq, Tk]``."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @property
    def size(self) -> tuple[int, int, int]:
        heads, new, total = self.mask.shape
        return heads, new, total

    def rows(self, columns: Tensor) -> Tensor:
        _, new, total = self.mask.shape
        return self.mask[:, columns - (total - new)]

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        first_valid: Tensor | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        mask = self.mask
        if first_valid is not None:
            start = first_valid.repeat_interleave(len(queries) // len(keys))
            mask = mask & (torch.arange(keys.shape[1]) >= start[:, None, None])
        output, lse = masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)
        return output, lse if need_lse else None

    def cell_density(self) -> Tensor:
        _, new, total = self.mask.shape
        return self.mask.tril(total - new).sum((1, 2)) / self.causal_pairs

    def tile_density(self) -> Tensor:
        return torch.ones(len(self.mask))  # it has no kernel that could leave a tile out


class EveryOtherKey(Named, PrefillSparsifier):
    """Each query attends to itself and to a share of the keys before it, taken evenly."""

    class Config(PolicyConfig):
        share: float = Field(0.5, gt=0, le=1, description="Share of the keys.")

    config: Config

    def mask(self, inputs: AttentionInputs) -> Tensor:
        """The cells to compute, bool ``[Hq, Tq, Tk]``."""
        keys = torch.arange(inputs.total_tokens, device=inputs.keys.device)
        own, seen = keys == inputs.columns[:, None], keys <= inputs.columns[:, None]
        taken = keys * 7 % 10 < 10 * self.config.share
        return ((taken | own) & seen).repeat(len(inputs.queries), 1, 1)

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return MaskPattern(self.mask(inputs))


class LargestKeys(Named, ScoredCompressor):
    """Keeps the pairs with the largest keys."""

    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    def score(self, inputs: AttentionInputs) -> Tensor:
        return inputs.keys.norm(dim=-1)

    def given(self, selection: KVSelection, step: Step) -> KVSelection:
        """What becomes of a selection before it is handed over."""
        return selection

    def after_forward(self, step: Step, state: ScoredState) -> Selections | None:
        chosen = super().after_forward(step, state)
        return chosen and {layer: self.given(selection, step) for layer, selection in chosen.items()}
