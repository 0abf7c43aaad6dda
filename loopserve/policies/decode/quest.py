"""Implement Quest: pages of keys, ranked by an upper bound for the current query, anew in every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from loopserve.core.kv.key_summaries import KeySummaries, best_pages
from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor


@dataclass
class QuestState:
    """Hold the page bounds of each layer's keys; a copy starts empty and is filled from the store."""

    key_summaries: dict[int, KeySummaries] = field(default_factory=dict)


class QuestDecode(DecodeCompressor[QuestState]):
    """Attend in each step to the pages of keys that could hold the largest logits of the current query (Quest).

    Paper: https://arxiv.org/abs/2406.10774. Variant: per page and channel the smallest and largest key are kept. The bound of a
    page is the sum over channels of the larger product of the query with either. The current page is always attended. Page size 16
    is as published. Size 4 captures far more attention at equal budget, and reads four times the bounds.

    Deviations: one selection per KV head by the largest bound in its group, where the authors' code supports only models with as
    many KV heads as query heads. The budget is in tokens and exact, this turn's outputs and the current page included, so the last
    page that fits may be taken in part. The first two layers are dense in the paper; the stack's ``layers`` can except them (preset
    ``quest``).

    Multi-turn: pages are selected again in every step. The whole store stays. Prompts and outputs of all turns are in pages of the
    same size, counted from the beginning of the conversation.
    """

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.10774"

    class Config(PolicyConfig):
        budget: int = Field(1024, gt=0, description="KV pairs attended per KV head in each step, in tokens.")
        page: int = Field(16, gt=0, description="Tokens per page; 16 as published, 4 recalls far more.")

        @model_validator(mode="after")
        def _page_fits(self) -> QuestDecode.Config:
            if self.page > self.budget:
                raise ValueError(f"a page ({self.page}) exceeds the budget ({self.budget})")
            return self

    config: Config

    @property
    def counts_outputs(self) -> bool:
        return True

    def init_state(self) -> QuestState:
        return QuestState()

    def held_bytes(self, state: QuestState) -> int:
        return sum(each.nbytes for each in state.key_summaries.values() if each.columns)

    def before_attention(self, inputs: AttentionInputs, state: QuestState) -> KVSelection | None:
        if inputs.total_tokens <= self.config.budget:
            return None
        summaries = state.key_summaries.setdefault(inputs.layer.index, KeySummaries(self.config.page))
        summaries.update(inputs.keys)
        inputs.record.read("summaries", summaries.nbytes)
        boundary = (inputs.total_tokens - 1) // self.config.page * self.config.page  # the page of the current token
        bounds = summaries.scores(inputs.queries, inputs.scaling)[:, : boundary // self.config.page]
        free = torch.ones(len(bounds), boundary, dtype=torch.bool, device=bounds.device)
        taken = best_pages(bounds, free, self.config.page, self.config.budget - (inputs.total_tokens - boundary))
        return KVSelection.uniform(taken.nonzero()[:, 1].view(len(taken), -1), boundary, fleeting=True)
