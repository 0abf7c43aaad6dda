"""Measure, over the text of a whole model run, which KV heads look far back."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.errors import ConfigError
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import DensePattern
from loopserve.policies.head_split import HeadScores, far_mass


class HeadSearch(PrefillSparsifier):
    """Compute every cell, and measure how much of each KV head's attention lies outside of sinks and recent window.

    Paper: https://arxiv.org/abs/2410.10819. The results are kept in the object, so each search needs a new object. It is not
    registered.

    Multi-turn: every prefill call that is longer than sinks and window has the same weight.
    """

    name: ClassVar[str] = "head_search"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"

    class Config(PolicyConfig):
        sink_tokens: int = Field(64, ge=0, description="First tokens that a streaming head attends to.")
        recent_window: int = Field(256, gt=0, description="Last tokens that a streaming head attends to.")

    config: Config

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self._mass: dict[int, list[Tensor]] = {}

    def sparsify(self, inputs: AttentionInputs) -> DensePattern:
        config = self.config
        if inputs.total_tokens > config.sink_tokens + config.recent_window:
            mass = far_mass(inputs, config.sink_tokens, config.recent_window, kind="lines")
            self._mass.setdefault(inputs.layer.index, []).append(mass.cpu())
        return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)

    def found(self) -> HeadScores:
        """Return far mass per KV head by layer, mean over the calls. Raises ConfigError if nothing was measured."""
        if not self._mass:
            raise ConfigError("the search saw no full-attention layer with more tokens than sinks and recent window")
        return {layer: torch.stack(calls).mean(0).tolist() for layer, calls in sorted(self._mass.items())}
