"""Define the options of LoopServe's progressive KV compression."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from loopserve.core.policy.base import PolicyConfig


class Scope(StrEnum):
    INPUTS = "inputs"  # outputs of this turn are attended in addition to the budget
    ALL = "all"  # older outputs compete for the budget, so a long answer attends to no more


class FirstBlock(StrEnum):
    TWO_HOP = "two_hop"
    LAST_WINDOW = "last_window"
    SAMPLED = "sampled"
    DENSE = "dense"


class Share(StrEnum):
    NONE = "none"
    HEADS = "heads"
    LAYER_GROUPS = "layer_groups"
    ALL = "all"


class Trigger(StrEnum):
    INTERVAL = "interval"
    DRIFT = "drift"


class Pool(StrEnum):
    FULL = "full"
    ACTIVE = "active"


class SecondHop(StrEnum):
    AGAIN = "again"
    KEPT = "kept"


class Rescore(StrEnum):
    KEYS = "keys"
    CODES = "codes"


class PageBudgetRule(StrEnum):
    TOP_K = "top_k"
    THRESHOLD = "threshold"


class PoolingKind(StrEnum):
    AVERAGE = "average"
    MAXIMUM = "maximum"


class RowsJoined(StrEnum):
    MEAN = "mean"
    MAX = "max"


class LoopServeDecodeConfig(PolicyConfig):
    budget: int = Field(
        1024, gt=0, description="KV pairs selected per KV head, in tokens, forced and jumped-to ones included."
    )
    dense_below: float = Field(
        1.0,
        ge=1,
        description="Conversations of up to this many budgets are decoded dense: selecting costs more than it saves there.",
    )
    interval: int = Field(16, gt=0, description="Outputs between two selections (n_d).")
    window: int | None = Field(
        None, gt=0, description="Last output queries that a re-selection scores; as many as the interval by default."
    )
    scope: Scope = Field(
        Scope.INPUTS,
        description="inputs: this turn's outputs are attended on top of the budget; all: older ones compete for it.",
    )
    first_block: FirstBlock = Field(
        FirstBlock.TWO_HOP,
        description="First observation: two_hop: the last rows, then the rows of this turn they look at; "
        "last_window: the last rows; sampled: rows at random of the last prefill chunk; "
        "dense: nothing, the first interval is decoded dense.",
    )
    second_hop: SecondHop = Field(
        SecondHop.AGAIN,
        description="again: the rows found by hop one are run again in an observation pass; kept: queries are kept "
        "to the prefill's end, which saves that pass unless it came in chunks and a row lies in an earlier one.",
    )
    hop_rows: int = Field(16, gt=0, description="Rows of the turn that hop two (or the random sample) observes.")
    hop_window: int = Field(16, gt=0, description="Last rows of the turn that hop one (or last_window) observes.")
    memory: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Decay of the running maximum over a turn's observations; 0 = each replaces the one before.",
    )
    share: Share = Field(
        Share.ALL,
        description="Who shares one selection: none, the heads of a layer, of layer_groups, or of all layers.",
    )
    layer_group: int = Field(4, gt=0, description="Neighbouring layers that share under share: layer_groups.")
    trigger: Trigger = Field(
        Trigger.INTERVAL,
        description="interval: re-select every `interval` outputs; drift: when the current query is lost.",
    )
    drift_threshold: float = Field(
        0.7,
        gt=0,
        le=1,
        description="Drift is when the captured share falls below this part of what it was at selection.",
    )
    drift_min_interval: int = Field(1, gt=0, description="Outputs that pass at least between two selections by drift.")
    drift_max_interval: int = Field(
        0, ge=0, description="Outputs after which trigger: drift re-selects in any case; 0 = never."
    )
    rows: RowsJoined = Field(
        RowsJoined.MEAN,
        description="How the rows of an observation are joined: mean (the paper's sum) or max; two_hop takes the max.",
    )
    pooling: int = Field(7, gt=0, description="Width of the pooling of scores over neighbouring tokens; odd, 1 = none.")
    pooling_kind: PoolingKind = Field(PoolingKind.AVERAGE, description="average or maximum over the neighbours.")
    sink_tokens: int = Field(4, ge=0, description="First tokens of the conversation that are always selected.")
    recent_window: int = Field(
        16, ge=0, description="Last candidates (of the input, or of all so far) that are always selected."
    )
    pool: Pool = Field(
        Pool.FULL,
        description="full: every pair can be selected again; active: what is dropped is evicted and never returns.",
    )
    page_budget: int = Field(
        0, ge=0, description="Part of the budget that each step gives to what its own query points to; 0 = off."
    )
    page_budget_rule: PageBudgetRule = Field(
        PageBudgetRule.TOP_K,
        description="top_k: each head and step gives exactly page_budget pairs; threshold (needs key_bits): every pair whose "
        "estimated share of the attention reaches one threshold for all heads, steered so that the mean is page_budget.",
    )
    page_budget_least: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fewest pairs of a head and step under page_budget_rule: threshold, of page_budget.",
    )
    page_budget_most: float = Field(
        4.0, ge=1, description="Most pairs of a head and step under page_budget_rule: threshold, of page_budget."
    )
    key_bits: Literal[0, 2, 4, 8] = Field(
        0,
        description="What the current query is held against: 0: bounds of pages, and whole pages are taken; else a code "
        "of each key, that many bits per channel, kept beside the store, and single tokens are taken.",
    )
    rescore: Rescore = Field(
        Rescore.KEYS,
        description="What a re-selection is scored on. keys: the last output queries over all keys; codes (needs key_bits): "
        "the scores that the codes gave each output's query in its own step, without another read.",
    )
    page: int = Field(16, gt=0, description="Columns per page of the key summaries (page_budget and drift).")
    seed: int = Field(0, ge=0, description="Seed of first_block: sampled.")

    @property
    def by_threshold(self) -> bool:
        return self.page_budget_rule is PageBudgetRule.THRESHOLD

    @property
    def most_page_pairs(self) -> int:
        """Return the most pairs that a step gives to the current query of one head under ``page_budget_rule: threshold``."""
        return int(self.page_budget_most * self.page_budget)

    @model_validator(mode="after")
    def _consistent(self) -> LoopServeDecodeConfig:
        forced = self.sink_tokens + self.recent_window + self.page_budget
        if forced > self.budget or self.page_budget == self.budget:
            raise ValueError(
                f"sink_tokens + recent_window + page_budget ({self.sink_tokens} + {self.recent_window} + "
                f"{self.page_budget}) leave nothing of the budget ({self.budget}) to select"
            )
        if self.pooling % 2 == 0:
            raise ValueError(f"pooling must be odd, got {self.pooling}")
        if self.drift_max_interval and self.drift_max_interval < self.drift_min_interval:
            raise ValueError(
                f"drift_max_interval {self.drift_max_interval} is below drift_min_interval {self.drift_min_interval}"
            )
        if self.by_threshold and not (self.key_bits and self.page_budget and self.trigger is Trigger.INTERVAL):
            raise ValueError(
                "page_budget_rule: threshold needs key_bits, page_budget and trigger: interval, since weights follow from codes"
            )
        if self.rescore is Rescore.CODES and not (
            self.key_bits and self.page_budget and self.trigger is Trigger.INTERVAL
        ):
            raise ValueError(
                "rescore: codes needs key_bits, page_budget and trigger: interval, which read the codes at each step"
            )
        if self.pool is Pool.ACTIVE and (self.page_budget or self.trigger is Trigger.DRIFT):
            raise ValueError(
                "pool: active evicts what it drops: page_budget and trigger: drift have nothing to bring back"
            )
        return self
