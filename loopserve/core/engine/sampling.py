"""Choosing the next token from logits. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from loopserve.core.errors import ModelError


class SamplingConfig(BaseModel):
    """How an answer is drawn. The default is greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(256, gt=0, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0.0, description="0 = greedy; else logits are divided by it.")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="Keep the likeliest tokens up to this probability.")
    top_k: int = Field(0, ge=0, description="Keep this many likeliest tokens; 0 = all.")
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="Makes a drawn answer repeatable.")


class Sampler:
    """Draws tokens for one answer; its generator is its own."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token id, from logits ``[vocabulary]``. Equal logits: the lowest id."""
        config = self.config
        if bool(logits.isnan().any()):
            raise ModelError("the model's logits are not numbers (NaN): its weights are damaged or its dtype overflows")
        if config.temperature == 0.0:
            return int(logits.argmax())
        scores = logits.double().cpu()
        values, ids = ((scores - scores.max()) / config.temperature).sort(descending=True, stable=True)
        if config.top_k:
            values, ids = values[: config.top_k], ids[: config.top_k]
        probabilities = values.softmax(0)
        if config.top_p < 1.0:
            before = probabilities.cumsum(0) - probabilities
            probabilities[1:] = probabilities[1:].masked_fill(before[1:] >= config.top_p, 0.0)
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])


class Dictation:
    """Stands in for a ``Sampler`` where the answer is known: its tokens one by one, whatever the logits say."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, logits: Tensor) -> int:
        return next(self._tokens)
