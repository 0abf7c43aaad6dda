"""Implement RocketKV in its multi-turn form: a coarse filter once per turn, a fine choice of pages in every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import max_pool1d

from loopserve.core.kv.key_summaries import best_pages
from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Phase
from loopserve.kernels.key_codes import page_bounds
from loopserve.kernels.top_columns import top_columns


@dataclass(frozen=True)
class Filtered:
    """Hold the columns that one turn's filter passes in a layer, int64 ``[Hkv, F]`` before ``end``, and the bounds of their pages."""

    columns: Tensor
    low: Tensor  # [Hkv, P, D]
    high: Tensor
    end: int
    all_in: bool  # nothing was filtered out


@dataclass
class RocketState:
    layers: dict[int, Filtered] = field(default_factory=dict)


class RocketKVMTDecode(DecodeCompressor[RocketState]):
    """Filter the history once per turn by the last queries, then attend in each step to the filtered pages that the current query
    could need (RocketKV-MT).

    Paper: https://arxiv.org/abs/2502.14051. Written from the paper alone. Stage one: attention of the last ``window`` queries,
    maximum over ``kernel`` neighbours, the best ``filter_budget`` pairs per KV head. Stage two: bounds of the keys of ``page``
    filtered neighbours on the ``channels`` channels where the group's queries are largest, the best pages for each step's query.

    Variant and deviations: an interpretation of the paper (its two-level choice along tokens and channels). The license of its code
    does not permit free use. The budget is exact, so the last page may be taken in part. Outputs of this turn are attended in
    addition. The paper's adaptive split of the compression between the stages is two fields here.

    Multi-turn: the filter holds for one turn only. The store keeps everything, and the next turn's prefill sees all of it and
    filters again. RocketKV, in contrast, evicts.
    """

    name: ClassVar[str] = "rocketkv_mt"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.14051"

    class Config(PolicyConfig):
        budget: int = Field(512, gt=0, description="KV pairs of the input attended per KV head in each step.")
        filter_budget: int = Field(4096, gt=0, description="KV pairs per KV head that a turn's filter lets through.")
        window: int = Field(32, gt=0, description="Last queries of the input that filter; their pairs pass.")
        kernel: int = Field(63, gt=0, description="Width of the maximum pooling of the filter's scores; odd, 1 = none.")
        page: int = Field(16, gt=0, description="Filtered tokens per page.")
        channels: int | None = Field(
            None, gt=0, description="Channels that bounds are computed on; half of them by default."
        )

        @model_validator(mode="after")
        def _stages_narrow(self) -> RocketKVMTDecode.Config:
            if not max(self.window, self.budget) <= self.filter_budget:
                raise ValueError(
                    f"window ({self.window}) and budget ({self.budget}) must not exceed filter_budget ({self.filter_budget})"
                )
            if self.kernel % 2 == 0:
                raise ValueError(f"kernel must be odd, got {self.kernel}")
            return self

    config: Config

    def init_state(self) -> RocketState:
        return RocketState()

    def end_turn(self, state: RocketState) -> None:
        state.layers.clear()  # the filter holds for one turn

    def held_bytes(self, state: RocketState) -> int:
        return sum(2 * each.low.numel() * each.low.element_size() for each in state.layers.values())

    def after_attention(self, inputs: AttentionInputs, state: RocketState) -> None:
        if inputs.phase is Phase.PREFILL and inputs.final:
            state.layers[inputs.layer.index] = self._filter(inputs)

    def _filter(self, inputs: AttentionInputs) -> Filtered:
        heads, total, dim = inputs.keys.shape
        all_in = total <= self.config.filter_budget
        if all_in:
            columns = torch.arange(total, device=inputs.keys.device).expand(heads, -1)
        else:
            window = min(self.config.window, inputs.new_tokens)
            scores = inputs.token_scores(inputs.queries[:, -window:], inputs.columns[-window:])[:, :-window]
            if self.config.kernel > 1 and scores.shape[1]:
                scores = max_pool1d(scores[:, None], self.config.kernel, stride=1, padding=self.config.kernel // 2)[
                    :, 0
                ]
            scores = torch.cat([scores, scores.new_full((heads, window), float("inf"))], dim=1)
            columns = top_columns(scores, self.config.filter_budget)
        low, high = page_bounds(inputs.keys.gather(1, columns[..., None].expand(-1, -1, dim)), self.config.page)
        return Filtered(columns, low, high, total, all_in)

    def before_attention(self, inputs: AttentionInputs, state: RocketState) -> KVSelection | None:
        filtered = state.layers.get(inputs.layer.index)
        if filtered is None:
            return None
        heads, count = filtered.columns.shape
        if count <= self.config.budget:
            if filtered.all_in or inputs.selection is not None:
                return None
            return KVSelection.uniform(filtered.columns, filtered.end)
        inputs.record.read(
            "summaries", filtered.low.numel() * filtered.low.element_size()
        )  # one of the bounds per channel
        free = torch.ones(heads, count, dtype=torch.bool, device=filtered.columns.device)
        taken = best_pages(self._bounds(inputs, filtered), free, self.config.page, self.config.budget)
        return KVSelection.uniform(filtered.columns[taken].view(heads, -1), filtered.end, fleeting=True)

    def _bounds(self, inputs: AttentionInputs, filtered: Filtered) -> Tensor:
        """Return upper bounds of the current query's products with each filtered page, on the largest channels ``[Hkv, P]``."""
        heads, pages, dim = filtered.low.shape
        queries = inputs.queries[:, -1].view(heads, -1, dim).float()
        count = min(self.config.channels or max(1, dim // 2), dim)
        largest = queries.abs().sum(1).topk(count, dim=-1).indices[:, None]  # [Hkv, 1, channels]
        near = queries.gather(2, largest.expand(-1, queries.shape[1], -1))
        low, high = (part.float().gather(2, largest.expand(-1, pages, -1)) for part in (filtered.low, filtered.high))
        bounds: Tensor = near.clamp(min=0) @ high.transpose(1, 2) + near.clamp(max=0) @ low.transpose(1, 2)
        return bounds.amax(1)
