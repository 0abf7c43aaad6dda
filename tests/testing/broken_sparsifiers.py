"""Sparsifiers that break one promise."""

from __future__ import annotations

import itertools
import threading

import torch
from torch import Tensor

from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import AttentionPattern
from tests.testing.honest import EveryOtherKey, MaskPattern

_CALLS = itertools.count()
_LAST: dict[torch.Size, Tensor] = {}


def _first_turn(inputs: AttentionInputs) -> bool:
    return inputs.new_tokens == inputs.total_tokens


class ForgetsTheLastKey(EveryOtherKey):
    """Makes the pattern of a first turn one column too narrow."""

    class Narrow(MaskPattern):
        def rows(self, columns: Tensor) -> Tensor:
            return super().rows(columns)[..., :-1]

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        mask = self.mask(inputs)
        return self.Narrow(mask) if _first_turn(inputs) else MaskPattern(mask)


class LooksAhead(EveryOtherKey):
    """Lets one query of a first turn see a later key."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        mask = super().mask(inputs)
        if _first_turn(inputs):
            mask[0, 5, 9] = True
        return mask


class BlindToItself(EveryOtherKey):
    """Leaves out one query's own key in a first turn, and in the widest setting nothing."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        mask = super().mask(inputs)
        if _first_turn(inputs) and self.config.share < 1:
            mask[1, 31, 31] = False
        return mask


class AttendsToOthers(EveryOtherKey):
    """Attends to all causal keys, whatever its mask says, and gives the mask's log-sum-exp."""

    class Other(MaskPattern):
        def attend(self, *tensors: Tensor, need_lse: bool = False, **options: object) -> tuple[Tensor, Tensor | None]:
            _, new, total = self.size
            dense = MaskPattern(torch.ones_like(self.mask).tril(total - new))
            lse = super().attend(*tensors, need_lse=need_lse, **options)[1]  # type: ignore[arg-type]
            return dense.attend(*tensors, **options)[0], lse  # type: ignore[arg-type]

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return self.Other(self.mask(inputs))


class SumsInAnotherBase(EveryOtherKey):
    """Gives the logarithm of the sum to base two."""

    class BaseTwo(MaskPattern):
        def attend(self, *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
            output, lse = super().attend(*tensors, **options)  # type: ignore[arg-type]
            return output, lse / torch.tensor(2.0).log() if lse is not None else None

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return self.BaseTwo(self.mask(inputs))


class RowsOfTheWrongQueries(EveryOtherKey):
    """Gives the rows before those asked for, unless all are asked for."""

    class Shifted(MaskPattern):
        def rows(self, columns: Tensor) -> Tensor:
            whole = len(columns) == self.mask.shape[1]
            return super().rows(columns if whole else columns - 1)

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return self.Shifted(self.mask(inputs))


class FlattersItself(EveryOtherKey):
    """Says that it computes half of what it does."""

    class Flattering(MaskPattern):
        def cell_density(self) -> Tensor:
            return super().cell_density() / 2

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return self.Flattering(self.mask(inputs))


class NothingLeftOut(EveryOtherKey):
    """Computes everything, whatever its options say."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        return torch.ones_like(super().mask(inputs)).tril(inputs.total_tokens - inputs.new_tokens)


class QueriesFromZero(EveryOtherKey):
    """Takes the first new query to stand at column 0, where there is a history."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        mask = super().mask(inputs)
        if inputs.positions.dim() == 1 and not _first_turn(inputs):
            return mask.tril(0)
        return mask


class PositionsForColumns(EveryOtherKey):
    """Takes the place in the conversation for the place in the store, after an eviction that left no filler."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        mask = super().mask(inputs)
        if inputs.positions.dim() == 2 and inputs.first_valid is None:
            mask = torch.cat([mask, mask.new_zeros(*mask.shape[:2], inputs.length - inputs.total_tokens)], dim=2)
        return mask


class ListensToFiller(EveryOtherKey):
    """Attends to columns in front of a head's first pair."""

    class Unguarded(MaskPattern):
        def attend(self, *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor | None]:
            return super().attend(*tensors, **(options | {"first_valid": None}))  # type: ignore[arg-type]

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return self.Unguarded(self.mask(inputs))


class NeverTheSame(EveryOtherKey):
    """Draws each pattern anew and does not declare it."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        mask = super().mask(inputs)
        if self.config.share < 1 and _first_turn(inputs):
            mask[:, 3, next(_CALLS) % 3] ^= True
        return mask


class RemembersTheLastOne(EveryOtherKey):
    """Adds the keys that the last conversation of the same size looked at, which it keeps in its module."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        mask = super().mask(inputs)
        looked_at = inputs.keys.sum(-1).gt(3).repeat_interleave(inputs.group, 0)[:, None]
        other = _LAST.get(mask.shape, looked_at)
        _LAST[mask.shape] = looked_at
        return mask | (other & torch.ones_like(mask).tril(inputs.total_tokens - inputs.new_tokens))


class KeepsALock(EveryOtherKey):
    """Writes into its state what cannot be copied."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        inputs.state.setdefault("lock", threading.Lock())
        return super().mask(inputs)


class NeverQuiteDense(EveryOtherKey):
    """Leaves the second key out in its widest setting as well."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        mask = super().mask(inputs)
        mask[:, 2:, 1] = False
        return mask


class AsksTheGPU(EveryOtherKey):
    """Reads a number from the device before it chooses; on a CPU it goes unnoticed."""

    def mask(self, inputs: AttentionInputs) -> Tensor:
        assert inputs.keys.max().item() > 0
        return super().mask(inputs)


BROKEN = {
    "pattern_covers_the_block": ForgetsTheLastKey,
    "pattern_is_causal": LooksAhead,
    "every_query_sees_itself": BlindToItself,
    "attend_equals_masked_attention": AttendsToOthers,
    "lse_is_that_of_the_mask": SumsInAnotherBase,
    "rows_are_those_of_the_mask": RowsOfTheWrongQueries,
    "density_counts_the_mask": FlattersItself,
    "sparsity_is_in_effect": NothingLeftOut,
    "history_is_accepted": QueriesFromZero,
    "gaps_in_positions_are_accepted": PositionsForColumns,
    "filler_is_never_attended": ListensToFiller,
    "same_inputs_give_the_same_pattern": NeverTheSame,
    "rows_of_a_batch_are_independent": RemembersTheLastOne,
    "sparsifier_state_survives_a_fork": KeepsALock,
    "widest_setting_is_dense": NeverQuiteDense,
    "gpu_is_never_waited_for": AsksTheGPU,
}
