"""Call a scorer once per layer and turn, and pass its scores to loopserve's ScoredCompressor."""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from loopserve import (
    AttentionInputs,
    Capabilities,
    ConfigError,
    LayerSpec,
    Need,
    PolicyError,
    Retention,
    ScoredCompressor,
    ScoredConfig,
    ScoredState,
)
from loopserve_kvpress.scorers import Option, Scorer, make_scorer
from loopserve_kvpress.stand_in import StandInModule, cos_and_sin, parts_of, rotates_by_halves


class ScorerConfig(ScoredConfig):
    """Configure budget, forced pairs and retention.

    A scorer's own compression ratio is set from the budget in every call.
    """

    reads_queries: bool = Field(
        True,
        description="Whether the scorer reads hidden states or the module's rotation (SnapKV does, Knorm does not).",
    )
    attentions: bool = Field(
        False, description="Give the scorer the attention of the turn's rows; memory grows with rows times pairs."
    )


class ScorerDecode(ScoredCompressor):
    """Keep the pairs that a kvpress-style scorer ranks highest. Subclasses define the scorer.

    The scorer sees one session as a batch of one: the queries of the turn's last prefill call and the whole store.
    Sinks and a recent window are kept in addition. Set both to 0 to keep only what the scorer ranks highest.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(ScorerConfig):
        """Take the scorer of the subclass."""

    config: ScorerConfig

    @property
    def can_be_weighed(self) -> bool:
        return False  # scores need not be positive

    @property
    def effective_capabilities(self) -> Capabilities:
        needs = frozenset({Need.ROTARY}) if self.config.reads_queries else frozenset()
        return replace(self.capabilities, needs=self.capabilities.needs | needs)

    @property
    @abstractmethod
    def scorer(self) -> Scorer:
        """Return the object whose ``score`` is called. It is shared by all sessions, and loopserve calls a copy."""

    def refuses(self, layer: LayerSpec) -> str | None:
        if not self.config.reads_queries or layer.lacks(Need.ROTARY) is not None or layer.parts is None:
            return None  # not needed, or refused for another reason
        if rotates_by_halves(layer.parts, layer.head_dim):
            return None
        return (
            "takes queries for rotated by halves over all channels, and this model rotates otherwise: set reads_queries: false "
            "if the scorer does not look at queries"
        )

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        return self._asked(inputs, budget)

    def score(self, inputs: AttentionInputs) -> Tensor:
        return self._asked(inputs, self.limits.budget)

    def _asked(self, inputs: AttentionInputs, budget: int) -> Tensor:
        heads, total, _ = inputs.keys.shape
        if inputs.first_valid is None:
            return self._scores(inputs, slice(0, heads), 0, budget)
        # Heads with different numbers of pairs are scored one by one, since filler would be ranked otherwise.
        rows = torch.full((heads, total), float("-inf"), dtype=torch.float32, device=inputs.keys.device)
        for head, start in enumerate(inputs.first_valid.tolist()):
            rows[head, start:] = self._scores(inputs, slice(head, head + 1), start, budget)[0]
        return rows

    def _scores(self, inputs: AttentionInputs, heads: slice, start: int, budget: int) -> Tensor:
        keys, values = inputs.keys[heads, start:], inputs.values[heads, start:]
        own = slice(heads.start * inputs.group, heads.stop * inputs.group)
        module = StandInModule(inputs, len(keys), self.config.reads_queries)
        hidden, options = self._states(inputs, own)
        attentions = self._attentions(inputs, own, start) if self.config.attentions else None
        try:
            scorer = _with_ratio(self.scorer, 1 - min(budget + 0.5, keys.shape[1]) / keys.shape[1])
            # Copies, since a scorer may write into its inputs.
            found = scorer.score(module, hidden, keys[None].clone(), values[None].clone(), attentions, options)
        except Exception as error:  # foreign code may raise anything
            raise PolicyError(f"{self._called}: {type(error).__name__}: {error}") from error
        if not isinstance(found, Tensor) or found.shape != (1, *keys.shape[:2]):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise PolicyError(f"{self._called}: score must give [1, {len(keys)}, {keys.shape[1]}], it gave {shape}")
        return found[0].float()

    def _states(self, inputs: AttentionInputs, own: slice) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the queries as hidden states ``[1, T, heads * D]``, and the rotation to their positions."""
        if not self.config.reads_queries:
            return None, {}
        parts, positions = parts_of(inputs), inputs.head_positions(0)[inputs.columns]
        queries = parts.rotate(inputs.queries[own], positions, back=True)
        queries = queries * (inputs.scaling * queries.shape[2] ** 0.5)  # kvpress always divides by the root of D
        hidden = queries.transpose(0, 1).reshape(1, len(positions), -1)
        return hidden, {"position_embeddings": cos_and_sin(parts, positions, hidden[..., : queries.shape[2]])}

    def _attentions(self, inputs: AttentionInputs, own: slice, start: int) -> Tensor:
        rows = torch.arange(inputs.new_tokens, device=inputs.queries.device)
        return inputs.row_attention(rows).probabilities[None, own, :, start:]

    @property
    def _called(self) -> str:
        return f"decode policy {self.name!r}, scorer {type(self.scorer).__name__}"


def _with_ratio(scorer: Scorer, ratio: float) -> Scorer:
    """Return a copy that removes this share of the pairs, where the scorer has a ratio.

    The given scorer is not changed.
    """
    if not hasattr(scorer, "compression_ratio"):
        return scorer
    own = copy.deepcopy(scorer)
    own.compression_ratio = ratio  # type: ignore[attr-defined]
    return own


class KVPressDecode(ScorerDecode):
    """Keep the pairs that a scorer of kvpress, or one with the same interface, ranks highest.

    The stack file names the scorer.

    Paper: https://arxiv.org/abs/2510.00636 (KVPress, with Expected Attention). Variant: the ``score`` of a press is
    called unchanged, with an attention module that is derived from the queries. Its ``compress``, its hooks and its
    ratio are not used.

    Deviations: the budget is exact and in tokens. Ties go to the lowest position. Sinks and a recent window are kept in
    addition. Presses that need true hidden states, ``k_proj``, weights of another model or several passes are refused.

    Multi-turn: scores are computed at the end of each turn's prefill over the whole store, by the queries of the new
    turn (of its last chunk, with chunked prefill). kvpress has no later turns.
    """

    name: ClassVar[str] = "kvpress"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.00636"

    class Config(ScorerConfig):
        press: str = Field(
            description="A class of kvpress, such as SnapKVPress, or a scorer that a distribution names."
        )
        options: dict[str, Option] = Field(default_factory=dict, description="Options of the scorer.")

        @model_validator(mode="after")
        def _can_be_made(self) -> KVPressDecode.Config:
            try:
                make_scorer(self.press, self.options)
            except ConfigError as error:
                raise ValueError(str(error)) from error
            return self

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._scorer = make_scorer(config.press, config.options)

    @property
    def scorer(self) -> Scorer:
        return self._scorer
