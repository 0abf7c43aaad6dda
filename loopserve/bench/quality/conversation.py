"""Run one benchmark dialogue under one stack, with two answers per turn: the model's and the gold answer of the data set.

The gold answer goes through decode steps under the same stack, token by token, like an answer of the model. The
conversation then continues as if the model had given it, and the model's logits at each of its tokens are recorded.
``Distributions`` measures their divergence from those of dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import Dictation, Sampler, SamplingConfig
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import ModelError
from loopserve.models.chat import ChatTokenizer
from loopserve.models.messages import Message

_WHOLE = 4096  # vocabularies up to this size are stored whole
_KEPT = 256  # of larger ones the likeliest tokens are stored, and all others merged into one
_LEAST = 1e-30
History = Literal["gold", "generated"]


@dataclass(frozen=True)
class Distributions:
    """Hold dense attention's distributions over the tokens of one answer, on the CPU.

    logs ``[n, k]``: log-probabilities, float64. ids ``[n, k]``: token ids; None for the whole vocabulary in order.
    """

    logs: Tensor
    ids: Tensor | None

    @classmethod
    def of(cls, logits: Sequence[Tensor]) -> Distributions:
        """Return the distributions for the logits ``[vocabulary]`` of each token of an answer."""
        if not logits:
            return cls(torch.empty(0, 0, dtype=torch.float64, device="cpu"), None)
        if len(logits[0]) <= _WHOLE:
            return cls(torch.stack([_logs(each).cpu() for each in logits]), None)
        best = [_logs(each).topk(_KEPT) for each in logits]
        return cls(
            torch.stack([each.values.cpu() for each in best]), torch.stack([each.indices.cpu() for each in best])
        )

    def divergences(self, logits: Sequence[Tensor]) -> list[float]:
        """Return KL(dense || other) in nats for each token of the answer.

        Of a large vocabulary all tokens but dense's 256 likeliest are merged into one, which can only reduce the
        divergence.
        """
        return [
            _divergence(dense, _logs(other).cpu(), None if self.ids is None else self.ids[number])
            for number, (dense, other) in enumerate(zip(self.logs, logits, strict=True))
        ]


def _logs(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def _divergence(dense: Tensor, other: Tensor, ids: Tensor | None) -> float:
    if ids is not None:
        other = other[ids]
        dense, other = _with_rest(dense), _with_rest(other)
    if other.isnan().any() or dense.isnan().any():
        raise ModelError("the model's logits are not numbers (NaN)")
    likely = dense.exp()
    # Tokens without mass under dense add nothing. A token excluded only by the other side counts with the smallest probability.
    terms = likely * (dense - other.clamp(min=math.log(_LEAST)))
    return max(0.0, float(terms[likely > 0].sum()))


def _with_rest(logs: Tensor) -> Tensor:
    """Append the log-probability of all remaining tokens."""
    rest = (1.0 - logs.exp().sum()).clamp(min=_LEAST).log()
    return torch.cat([logs, rest[None]])


@dataclass(frozen=True)
class Answered:
    """Hold the result of one turn."""

    tokens: list[int]  # the model's tokens, with the end token; empty where the model was not asked
    text: str
    stopped: bool  # the model ended the answer itself
    stats: TurnStats  # of the model's own answer, if it gave one
    predictions: list[
        Tensor
    ]  # logits [vocabulary] at each token of the gold answer; empty where that is not in the history


class Conversation:
    """Hold a dialogue in progress; ``session`` is at its last complete turn."""

    def __init__(self, engine: TokenEngine, tokenizer: ChatTokenizer, stop_ids: frozenset[int]) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.messages: list[Message] = []
        self.session = engine.session()
        self._end = tokenizer.answer_end(stop_ids)

    def ask(self, text: str, gold: str | None, max_new_tokens: int, *, generate: bool = True) -> Answered:
        """Add a user message, let the model answer, and continue with ``gold``, or with the model's answer if that is None.

        generate: False where only the history matters; the model then generates nothing.
        """
        self.messages.append({"role": "user", "content": text})
        gold_ids = self.gold_tokens(gold) if gold is not None else []
        new_ids = self.tokenizer.turn_tokens(self.messages, self._stop_token())
        logits = self.engine.prefill(self.session, new_ids, max_new_tokens=max(max_new_tokens, len(gold_ids)))
        own = self.session
        answer: list[int] = []
        predictions: list[Tensor] = []
        if generate or gold is None:
            if gold is not None:
                self.session = own.fork()
            watch = _Watch(Sampler(SamplingConfig(max_new_tokens=max_new_tokens)), gold_ids)
            answer = list(self.engine.decode(own, logits, watch, self.stop_ids, max_new_tokens))
            predictions = watch.seen
        if gold is not None and answer == gold_ids:
            self.session = own  # nothing has to be decoded again
        elif gold_ids:
            watch = _Watch(Dictation(gold_ids), gold_ids)
            for _ in self.engine.decode(self.session, logits, watch, frozenset(), len(gold_ids)):
                pass
            predictions = watch.seen
        spoken = self.tokenizer.read_answer(answer).text.strip()
        self.messages.append({"role": "assistant", "content": gold if gold is not None else spoken})
        return Answered(answer, spoken, bool(answer) and answer[-1] in self.stop_ids, own.stats, predictions)

    def gold_tokens(self, gold: str) -> list[int]:
        """Return the tokens of a gold answer as the model would have generated it, with the end token."""
        return self.tokenizer.answer_tokens(gold) + ([self._end] if self._end is not None else [])

    def _stop_token(self) -> int | None:
        """Return the end token of the last answer, if it has one, so that the template does not add it again."""
        tokens = self.session.tokens
        return tokens[-1] if tokens and tokens[-1] in self.stop_ids else None


class _Watch:
    """Sample with another sampler, and record the logits while the tokens are a prefix of a given answer."""

    def __init__(self, choose: Sampler | Dictation, known: Sequence[int]) -> None:
        self.seen: list[Tensor] = []
        self._choose = choose
        self._known = known
        self._same = True

    def __call__(self, logits: Tensor) -> int:
        token = self._choose(logits)
        if self._same and len(self.seen) < len(self._known):
            self._same = token == self._known[len(self.seen)]
            self.seen.append(logits)
        return token
