"""Plan the answer of a turn: how its tokens are chosen, what ends it, and its greatest length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loopserve.core.engine.sampling import Choose, LogitsProcessor, Sampler, SamplingConfig
from loopserve.core.errors import ConfigError, InputError

StopCheck = Callable[[int], str | None]  # called with each output token; returns the stop string that it completes


@dataclass(frozen=True)
class AnswerPlan:
    """Hold how the tokens of an answer are chosen and what ends it.

    stop_check: called once with each output token, the last included; the answer ends with the token for which it returns a stop
    string.
    """

    choose: Choose | None = None  # None: the turn ends after its prefill
    stop_ids: frozenset[int] = frozenset()
    stop_check: StopCheck | None = None
    max_new_tokens: int = 0


def plan_answer(
    prompt: Sequence[int],
    window: int | None,
    sampling: SamplingConfig | Choose | None,
    *,
    stop_ids: frozenset[int] = frozenset(),
    stop_check: StopCheck | None = None,
    max_new_tokens: int | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> AnswerPlan:
    """Return the plan of the answer to ``prompt``, all tokens before it, in a model with a window of ``window`` tokens (None: no
    limit).

    The arguments are those of ``TokenEngine.begin``. Raises InputError for an answer that does not fit the window, and ConfigError
    for options that contradict each other.
    """
    choose, config = _chooser(prompt, sampling, logits_processors)
    if config is not None and config.stop and stop_check is None:
        raise ConfigError("stop: the engine of tokens knows no text; give it a stop_check, or use a chat session")
    left = None if window is None else window - len(prompt)
    if max_new_tokens is None:
        max_new_tokens = _default_length(choose, config, left)
    elif choose is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if left is not None and max_new_tokens > left:
        raise InputError(
            f"max_new_tokens={max_new_tokens} does not fit: {left} tokens are left of the model's {window}"
        )
    ignored = config is not None and config.ignore_eos
    return AnswerPlan(choose, frozenset() if ignored else stop_ids, stop_check, max_new_tokens)


def _chooser(
    prompt: Sequence[int], sampling: SamplingConfig | Choose | None, processors: Sequence[LogitsProcessor]
) -> tuple[Choose | None, SamplingConfig | None]:
    if isinstance(sampling, SamplingConfig):
        return Sampler(sampling, prompt, processors), sampling
    if processors:
        raise ConfigError("logits_processors need sampling settings beside them; a Sampler takes its own")
    return sampling, sampling.config if isinstance(sampling, Sampler) else None


def _default_length(choose: Choose | None, config: SamplingConfig | None, left: int | None) -> int:
    """Return the greatest length of an answer if the caller gave none: that of ``config``, or else at most ``left`` tokens."""
    if choose is None:
        return 0
    if config is None:
        raise InputError("max_new_tokens is needed beside a function that chooses the tokens")
    if left is None or "max_new_tokens" in config.model_fields_set:
        return config.max_new_tokens
    return max(1, min(config.max_new_tokens, left))
