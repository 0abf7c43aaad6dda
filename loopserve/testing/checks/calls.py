"""Make the call that most checks make of a sparsifier: a first turn of 48 tokens with structure in its attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import AttentionPattern
from loopserve.testing.inputs import make_inputs

NEW = 48


def first_turn(seed: int = 0) -> AttentionInputs:
    return make_inputs(new_tokens=NEW, total_tokens=NEW, seed=seed, structured=True)


def attended(pattern: AttentionPattern, inputs: AttentionInputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Return the attention through a pattern: output ``[Hq, Tq, D]``, and the log-sum-exp with ``need_lse``."""
    return pattern.attend(
        inputs.queries,
        inputs.keys,
        inputs.values,
        scaling=inputs.scaling,
        softcap=inputs.softcap,
        first_valid=inputs.first_valid,
        **options,
    )
