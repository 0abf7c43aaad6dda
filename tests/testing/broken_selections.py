"""Compressors that break one promise about what they select."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import AttentionInputs, Phase, Selections, Step
from loopserve.core.policy.scoring import ScoredState, best_held, from_columns, to_positions
from tests.testing.honest import LargestKeys

_EVERYTHING_FROM = 100  # output after which SwellsInALongAnswer selects all


def _uniform(selection: KVSelection, *parts: Tensor) -> KVSelection:
    return KVSelection.uniform(torch.cat(parts, dim=1), selection.boundary, selection.retention)


class SmallIntegers(LargestKeys):
    """Gives positions as int32."""

    def given(self, selection: KVSelection, step: Step) -> KVSelection:
        return replace(selection, indices=selection.indices.int())


class AnswersForOthers(LargestKeys):
    """Selects in a layer it does not rule."""

    def after_forward(self, step: Step, state: ScoredState) -> Selections | None:
        chosen = super().after_forward(step, state)
        return chosen and {**chosen, 7: next(iter(chosen.values()))}


class LastFirst(LargestKeys):
    """Gives the last position first."""

    def given(self, selection: KVSelection, step: Step) -> KVSelection:
        return replace(selection, indices=selection.indices.flip(1))


class KeepsOneTwice(LargestKeys):
    """Keeps one position twice, on top of its budget."""

    def given(self, selection: KVSelection, step: Step) -> KVSelection:
        kept = selection.indices
        return _uniform(selection, kept[:, :6], kept[:, 5:])


class BeyondTheEnd(LargestKeys):
    """Selects a token that has not been seen, on top of its budget."""

    def given(self, selection: KVSelection, step: Step) -> KVSelection:
        beyond = torch.full((len(selection.indices), 1), selection.boundary + 3)
        return _uniform(selection, selection.indices, beyond)


class SparesFive(LargestKeys):
    """Keeps five pairs fewer than its budget."""

    def given(self, selection: KVSelection, step: Step) -> KVSelection:
        kept = selection.indices
        return _uniform(selection, kept[:, :8], kept[:, 13:])


class SelectsWhatFits(LargestKeys):
    """Selects everything, where it could have said nothing."""

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        super().after_attention(inputs, state)
        if inputs.phase is Phase.PREFILL and inputs.final and inputs.total_tokens <= self.limits.budget:
            every = inputs.positions.expand(len(inputs.keys), -1)
            state.pending[inputs.layer.index] = KVSelection.uniform(every, inputs.length, self.retention)


class SwellsInALongAnswer(LargestKeys):
    """Selects everything, once an answer has become long."""

    def after_forward(self, step: Step, state: ScoredState) -> Selections | None:
        if step.phase is Phase.DECODE and step.output_index == _EVERYTHING_FROM:
            every = torch.arange(step.length)
            return {
                each.index: KVSelection.uniform(every.expand(each.kv_heads, -1), step.length) for each in step.layers
            }
        return super().after_forward(step, state)


class DropsTheFirstToken(LargestKeys):
    """Counts its first sink token among the least important."""

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        ranking = ranking.clone()
        ranking[:, 0] = float("-inf")
        ranking[:, 1 : self.limits.sink_tokens] = float("inf")
        limits = self.limits.model_copy(update={"sink_tokens": 0})
        kept = best_held(ranking, budget, limits, inputs.first_valid)
        return from_columns([row.nonzero().flatten() for row in kept], inputs, self.retention)


class DropsTheLastToken(LargestKeys):
    """Counts the last token of the input among the least important."""

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        ranking = ranking.clone()
        ranking[:, -self.limits.recent_window :] = float("inf")
        ranking[:, -1] = float("-inf")
        limits = self.limits.model_copy(update={"recent_window": 0})
        kept = best_held(ranking, budget, limits, inputs.first_valid)
        return from_columns([row.nonzero().flatten() for row in kept], inputs, self.retention)


class TakesFillerForPairs(LargestKeys):
    """Keeps the first columns of the store, filler or not, where a head holds fewer pairs."""

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        if inputs.first_valid is None:
            return super().choose(inputs, ranking, budget)
        columns = torch.arange(budget).expand(len(inputs.keys), -1)
        return KVSelection.uniform(to_positions(columns, inputs), inputs.length, self.retention)


class EvictsInTheThirdTurn(LargestKeys):
    """Declares that it keeps everything, and evicts from the third turn on."""

    def given(self, selection: KVSelection, step: Step) -> KVSelection:
        return replace(selection, retention=Retention.EVICT) if step.turn >= 2 else selection


class WantsItBack(LargestKeys):
    """Selects, after an eviction, a pair that is gone."""

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        selection = super().choose(inputs, ranking, budget)
        if selection is None or inputs.positions.dim() == 1 or self.retention is Retention.KEEP:
            return selection
        heads = []
        for head, positions in enumerate(inputs.positions):
            every = torch.arange(inputs.length)
            gone = every[~torch.isin(every, positions)][:1]
            kept = selection.head(head)
            heads.append(torch.cat([kept[:10], gone, kept[11:]]).sort().values)
        return KVSelection.from_heads(heads, selection.boundary, selection.retention)


class HoldsOnToTheStore(LargestKeys):
    """Remembers the keys it evicted from, so that their memory is not freed."""

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        super().after_attention(inputs, state)
        if self.retention is Retention.EVICT:
            state.statistics[inputs.layer.index] = inputs.keys


BROKEN = {
    "selections_have_the_right_form": SmallIntegers,
    "selections_are_for_its_own_layers": AnswersForOthers,
    "selections_are_sorted": LastFirst,
    "selections_are_unique": KeepsOneTwice,
    "selections_are_in_range": BeyondTheEnd,
    "budget_is_exact": SparesFive,
    "nothing_is_selected_within_the_budget": SelectsWhatFits,
    "a_thousand_outputs_stay_in_budget": SwellsInALongAnswer,
    "sinks_are_kept": DropsTheFirstToken,
    "recent_window_is_kept": DropsTheLastToken,
    "filler_is_never_selected": TakesFillerForPairs,
    "retention_is_as_declared": EvictsInTheThirdTurn,
    "evicted_pairs_stay_gone": WantsItBack,
    "evicted_bytes_are_freed": HoldsOnToTheStore,
}
