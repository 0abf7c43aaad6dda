"""Define the sampling options of an answer, their bounds and their error messages. Depends on no logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from loopserve.core.errors import ConfigError, did_you_mean

MAX_TOP_LOGPROBS = 20


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
