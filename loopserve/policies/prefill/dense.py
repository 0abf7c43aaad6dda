"""Implement dense prefill: every causal cell is computed."""

from __future__ import annotations

from typing import ClassVar

from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern


class DensePrefill(PrefillSparsifier):
    """Compute the whole causal attention matrix of a turn: the baseline for every other policy.

    Multi-turn: each new token attends to the whole stored history and to the new tokens before it. After an eviction it attends to
    the survivors.
    """

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(passive=True)

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)
