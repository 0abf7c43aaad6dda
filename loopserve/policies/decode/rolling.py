"""Drop a pair with every output, so that outputs and input share one budget."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig, ScoredState, from_columns, sound
from loopserve.kernels.top_columns import top_columns


class RollingConfig(ScoredConfig):
    """Define the options of a method that selects again after each output."""

    rolling: bool = Field(
        True,
        description="After each output let the least pair go, outputs included; else outputs come on top of the budget.",
    )


class RollingCompressor(ScoredCompressor):
    """Choose at the end of a turn's prefill, and after each output once more among the pairs still attended.

    A dropped pair is not selected again within the turn. With retention ``keep`` the next turn's prefill sees everything. With
    ``evict`` dropped pairs are removed.
    """

    class Config(RollingConfig):
        """Take the options of a method that selects again after each output."""

    config: RollingConfig

    @property
    def counts_outputs(self) -> bool:
        return self.config.rolling

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        if inputs.phase is not Phase.DECODE:
            super().after_attention(inputs, state)
            return
        self.observe(inputs, state)
        if not self.config.rolling:
            return
        here = inputs.attended(inputs.selection)
        budget = self.layer_budget(inputs)
        if int(here.sum(1).max()) <= budget:
            return
        ranking = sound(self.ranking(inputs, state, budget), inputs)
        state.pending[inputs.layer.index] = among(self.limits, ranking, here, budget, inputs, self.retention)


def among(
    limits: ScoredConfig, ranking: Tensor, here: Tensor, budget: int, inputs: AttentionInputs, retention: Retention
) -> KVSelection:
    """Return the best ``budget`` of the columns ``here``, bool ``[Hkv, Tk]``, of each head (all, where fewer are there)."""
    heads = []
    for row, inside in zip(ranking, here, strict=True):
        columns = inside.nonzero().flatten()
        best = top_columns(
            row[columns][None], budget, sink_tokens=limits.sink_tokens, recent_window=limits.recent_window
        )
        heads.append(columns[best[0]])
    return from_columns(heads, inputs, retention)
