"""Define the sampling options of an answer, and choose its tokens from logits. Depends on no model and no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from loopserve.core.errors import ConfigError, InputError, ModelError, did_you_mean

MAX_TOP_LOGPROBS = 20
Choose = Callable[[Tensor], int]  # the next token from logits [vocabulary]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # input ids [1, T] and scores [1, V] to scores [1, V]
_NUCLEUS = 1024  # tokens that top_p sorts first; sorting the whole vocabulary is slower and rarely necessary


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not True or False")
    return value


def _strings(value: Any) -> Any:
    """Accept one string, a list of strings or None."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
TokenId = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Bias = Annotated[float, BeforeValidator(_number), Field(ge=-100.0, le=100.0)]
StopString = Annotated[str, Field(min_length=1)]


class SamplingConfig(BaseModel):
    """Hold how the tokens of an answer are drawn, and what ends it. The default is greedy decoding.

    The options act on the logits in this order: ``logit_bias``, ``repetition_penalty``, ``frequency_penalty`` and
    ``presence_penalty``, logits processors of the caller, ``temperature``, ``min_p``, ``top_k``, ``top_p``. Names and meanings are
    those of vLLM. Options that transformers has too mean the same there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: Integer = Field(
        256,
        gt=0,
        description="Longest answer, in tokens. Not given: 256, or what is left of the model's window if less.",
    )
    temperature: Number = Field(0.0, ge=0.0, description="0 = greedy; else logits are divided by it.")
    top_p: Number = Field(1.0, gt=0.0, le=1.0, description="Keep the likeliest tokens up to this probability.")
    top_k: Integer = Field(0, ge=0, description="Keep this many likeliest tokens; 0 = all.")
    min_p: Number = Field(
        0.0, ge=0.0, le=1.0, description="Keep tokens at least this likely relative to the likeliest; 0 = all."
    )
    repetition_penalty: Number = Field(
        1.0, gt=0.0, le=100.0, description="Divide positive and multiply negative logits of tokens in prompt or answer."
    )
    presence_penalty: Number = Field(
        0.0, ge=-2.0, le=2.0, description="Subtract this from the logit of each token that the answer holds already."
    )
    frequency_penalty: Number = Field(
        0.0, ge=-2.0, le=2.0, description="Subtract this once per time that the answer holds the token already."
    )
    logit_bias: dict[TokenId, Bias] = Field({}, description="Token id -> bias that is added to its logit, -100 to 100.")
    stop: Annotated[tuple[StopString, ...], BeforeValidator(_strings)] = Field(
        (), description="One or several strings; the answer ends before the first that appears in its text."
    )
    ignore_eos: bool = Field(False, description="Go on after the model's stop tokens, up to max_new_tokens.")
    logprobs: bool = Field(False, description="Report the log-probability of each token of the answer.")
    top_logprobs: Integer = Field(
        0, ge=0, le=MAX_TOP_LOGPROBS, description="Report this many likeliest tokens at each place; needs logprobs."
    )
    seed: Integer | None = Field(None, ge=0, lt=1 << 63, description="Makes a drawn answer repeatable.")

    @model_validator(mode="after")
    def _check_logprobs(self) -> SamplingConfig:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=True")
        return self

    @property
    def greedy(self) -> bool:
        """Return whether the most likely token is taken instead of drawing one."""
        return self.temperature == 0.0

    @property
    def adjusts(self) -> bool:
        """Return whether bias or penalties change the logits."""
        return bool(self.logit_bias) or self.penalises

    @property
    def penalises(self) -> bool:
        """Return whether a penalty depends on the tokens so far."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def read_sampling(options: Mapping[str, Any], source: str = "", also: Iterable[str] = ()) -> SamplingConfig:
    """Read sampling options. Raises ConfigError that names the option, the mistake and the known options.

    source: origin of the options, for the message (such as ``the model's generation_config``). also: options that the caller reads
    itself; messages list them among the known ones.
    """
    where = f"{source}: " if source else ""
    for name in options:
        if name not in SamplingConfig.model_fields:
            known = [*SamplingConfig.model_fields, *also]
            raise ConfigError(f"{where}unknown sampling option {name!r}{did_you_mean(str(name), known)}")
    try:
        return SamplingConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{where}{place}: {message} (got {first['input']!r})" if place else f"{where}{message}"
        ) from error


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
                scores = scores.clamp(max=torch.finfo(scores.dtype).max)  # a tiny penalty overflows
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
