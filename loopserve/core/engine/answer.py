"""Plan the answer of a turn: how its tokens are chosen, what ends it, and its greatest length.

``StopStrings`` finds the end of an answer in its text as it arrives in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from loopserve.core.engine.sampling import Choose, LogitsProcessor, Sampler, SamplingConfig
from loopserve.core.errors import ConfigError, InputError

StopCheck = Callable[[int], str | None]  # called with each output token; returns the stop string that it completes


class AnswerOptions(TypedDict, total=False):
    """List the options of an answer beside its sampling settings; ``TokenEngine.begin`` documents them."""

    stop_ids: frozenset[int]
    stop_check: StopCheck | None
    max_new_tokens: int | None
    logits_processors: Sequence[LogitsProcessor]


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


class StopStrings:
    """Return text up to the first stop string, and hold back text that may become one.

    The result does not depend on how the text is split. The first stop string to be complete ends the answer. If several are
    complete at the same character, the longest one counts.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.matched: str | None = None
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._longest = max(map(len, strings), default=0)
        self._held = ""

    def push(self, piece: str) -> str:
        """Return the text that is certain to belong to the answer once ``piece`` is added; nothing after a match."""
        if self.matched is not None or not piece:
            return ""
        known, text = len(self._held), self._held + piece
        match = self._first(text, known)
        if match is not None:
            end, self.matched = match
            self._held = ""
            return text[: end - len(self.matched)]
        held = self._possible(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the text held back. Call it when the answer is over, since the text is no stop string then."""
        rest, self._held = self._held, ""
        return rest

    def _first(self, text: str, known: int) -> tuple[int, str] | None:
        """Return the end of the stop string that is complete first, and the string. None ends within the first ``known``
        characters.
        """
        match: tuple[int, str] | None = None
        for each in self._strings:  # the longest first: it counts where two end together
            start = text.find(each, max(0, known - len(each) + 1))
            if start >= 0 and (match is None or start + len(each) < match[0]):
                match = start + len(each), each
        return match

    def _possible(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(each.startswith(end) for each in self._strings):
                return length
        return 0
