"""Choose the next token from logits. Depends on no model and no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from loopserve.core.engine.sampling_config import SamplingConfig, read_sampling
from loopserve.core.errors import ConfigError, InputError, ModelError

Choose = Callable[[Tensor], int]  # the next token from logits [vocabulary]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # input ids [1, T] and scores [1, V] to scores [1, V]

_NUCLEUS = 1024  # tokens that top_p sorts first; sorting the whole vocabulary is slower and rarely necessary


class FinishReason(StrEnum):
    """Name the reason why an answer ended."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # max_new_tokens, or the end of the model's window


@dataclass(frozen=True)
class ChosenLogprob:
    """Hold the log-probability of a chosen token, and the most likely tokens in its place, most likely first.

    They are of the model's own distribution: before bias, penalties, processors and temperature.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # token id and log-probability


class Sampler:
    """Draw the tokens of one answer. Each answer has its own generator, counts and processors, so a batch does not change its
    tokens.
    """

    def __init__(
        self,
        config: SamplingConfig,
        prompt: Iterable[int] = (),
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        """Start an answer to ``prompt``, all tokens before it, which repetition_penalty and the processors use.

        logits_processors: called in order with ``(input_ids [1, T], scores [1, V])`` as in transformers; each must return the
        scores. Raises ConfigError for one that cannot be called.
        """
        for each in logits_processors:
            if not callable(each):
                raise ConfigError(
                    f"logits_processors: {each!r} cannot be called; give functions of (input_ids, scores)"
                )
        self.config = config
        self.logprobs: list[ChosenLogprob] = []  # one per chosen token, if the config asks for them
        self._processors = list(logits_processors)
        self._tokens = list(prompt) if self._processors or config.penalises else []
        self._prompt_length = len(self._tokens)
        self._counts: Tensor | None = None  # float64 [V], how often the answer holds each token
        self._seen: Tensor | None = None  # bool [V], whether prompt or answer holds it
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)

    def __call__(self, logits: Tensor) -> int:
        """Return the next token id, from logits ``[vocabulary]``. Of equal logits take the lowest id.

        Raises ModelError if the largest logit is not finite, and InputError if the caller's options or processors made them so.
        """
        best = int(logits.argmax())
        highest = float(logits[best])  # argmax treats a NaN as the highest value
        if not math.isfinite(highest):
            raise ModelError(_no_distribution(highest))
        config = self.config
        if config.adjusts or self._processors:
            scores = self._process(self._adjust(logits), logits.device)
            token = int(scores.argmax()) if config.greedy else self._draw(scores)
        else:
            token = best if config.greedy else self._draw(logits.double().cpu())
        if config.logprobs:
            self.logprobs.append(_logprob(logits, token, config.top_logprobs))
        if config.penalises or self._processors:
            self._note(token)
        return token

    def _draw(self, scores: Tensor) -> int:
        ids, probabilities = candidates(scores, self.config)
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])

    def _adjust(self, logits: Tensor) -> Tensor:
        """Return scores, float64 ``[V]`` on the CPU, with bias and penalties."""
        config, scores = self.config, logits.to("cpu", torch.float64, copy=True)
        if config.logit_bias:
            highest = max(config.logit_bias)
            if highest >= len(scores):
                raise ConfigError(f"logit_bias: token {highest} is not in the vocabulary of {len(scores)} tokens")
            ids = torch.tensor(list(config.logit_bias), dtype=torch.long, device="cpu")
            scores[ids] += torch.tensor(list(config.logit_bias.values()), dtype=torch.float64, device="cpu")
        if config.penalises:
            seen, counts = self._history(len(scores))
            if config.repetition_penalty != 1.0:
                penalty = config.repetition_penalty
                scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
            scores -= config.frequency_penalty * counts + config.presence_penalty * (counts > 0)
        return scores

    def _history(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        if self._seen is None or self._counts is None:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool, device="cpu")
            self._seen[
                torch.tensor([each for each in self._tokens if each < vocabulary], dtype=torch.long, device="cpu")
            ] = True
            self._counts = torch.zeros(vocabulary, dtype=torch.float64, device="cpu")
        return self._seen, self._counts

    def _note(self, token: int) -> None:
        self._tokens.append(token)
        if self._seen is not None and self._counts is not None:
            self._seen[token] = True
            self._counts[token] += 1

    def _process(self, scores: Tensor, device: torch.device) -> Tensor:
        """Apply the caller's processors to the scores, on the device of the model's logits."""
        if not self._processors:
            return scores
        input_ids = torch.tensor([self._tokens], dtype=torch.long, device=device)
        row = scores.to(device, torch.float32)[None]
        for each in self._processors:
            row = _processed(each, input_ids.clone(), row)
        return row[0].double().cpu()


class Dictation:
    """Replace a ``Sampler`` where the answer is known: return its tokens one by one, whatever the logits are."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = iter(tokens)

    def __call__(self, logits: Tensor) -> int:
        return next(self._tokens)


def candidates(scores: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Return the ids that may be drawn and their probabilities, float64 on the CPU, from scores float64 ``[V]`` on the CPU.

    temperature, min_p, top_k and top_p apply in this order, as in vLLM. Of equal scores the lowest ids are kept.
    """
    scores = (scores - scores.max()) / config.temperature
    ids = torch.arange(len(scores), dtype=torch.long, device="cpu")
    if config.min_p > 0.0:
        ids = ids[scores >= math.log(config.min_p)]
    if 0 < config.top_k < len(ids):
        ids = ids[largest(scores[ids], config.top_k)]
    if config.top_p == 1.0:
        return ids, scores[ids].softmax(0)
    values = scores[ids]
    probabilities = values.softmax(0)
    order = largest(values, _NUCLEUS)
    if len(order) < len(ids) and float(probabilities[order].sum()) < config.top_p:
        order = largest(values, len(ids))
    probabilities = probabilities[order]
    kept = probabilities.cumsum(0) - probabilities < config.top_p
    kept[0] = True
    return ids[order[kept]], probabilities[kept] / probabilities[kept].sum()


def largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest of values ``[N]``, in falling order; of equal values the lowest indices."""
    count = min(count, len(values))
    if count == 0:
        return torch.empty(0, dtype=torch.long, device="cpu")
    least = values.topk(count).values[-1]
    above = (values > least).nonzero()[:, 0]
    equal = (values == least).nonzero()[: count - len(above), 0]
    found = torch.cat([above, equal])
    return found[values[found].sort(descending=True, stable=True).indices]


def _logprob(logits: Tensor, token: int, top: int) -> ChosenLogprob:
    logprobs = logits.double().cpu().log_softmax(0)
    ids = largest(logprobs, top)
    pairs = zip(ids.tolist(), logprobs[ids].tolist(), strict=True)
    return ChosenLogprob(token, float(logprobs[token]), tuple(pair for pair in pairs if pair[1] > -math.inf))


def _processed(processor: LogitsProcessor, input_ids: Tensor, scores: Tensor) -> Tensor:
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        result = processor(input_ids, scores)
    except Exception as error:
        raise InputError(f"logits processor {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, Tensor) or result.shape != scores.shape:
        got = f"shape {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise InputError(f"logits processor {name} must return scores of shape {list(scores.shape)}, got {got}")
    result = result.to(scores.device, torch.float32)
    highest = float(result.max())
    if not math.isfinite(highest):
        fault = "allows no token: every score is -inf" if highest == -math.inf else "returned NaN or infinity"
        raise InputError(f"logits processor {name} {fault}")
    return result


def _no_distribution(highest: float) -> str:
    if math.isnan(highest):
        return "the model's logits are not numbers (NaN): its weights are damaged or its dtype overflows"
    if highest > 0:
        return "the model's logits are not numbers (infinity): its dtype overflows"
    return "the model's logits are all -inf, so that no token can follow: its weights are damaged"


__all__ = [
    "Choose",
    "ChosenLogprob",
    "Dictation",
    "FinishReason",
    "LogitsProcessor",
    "Sampler",
    "SamplingConfig",
    "candidates",
    "largest",
    "read_sampling",
]
