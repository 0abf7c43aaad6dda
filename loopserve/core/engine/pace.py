"""Bound the time of a forward pass, so that short messages do not wait long for the pass of a long prompt."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARED_S = 10.0  # after requests overlapped, others are expected for so long
_STEP_SHARE, _TOKEN_SHARE = 0.25, 0.5  # what the newest pass counts in the running means
_MULTIPLE = (
    16  # bounds are multiples of it, so that kernels get few different shapes; fewer tokens say nothing of their time
)
_FIRST = 64  # the bound before a pass without prompt tokens was seen
_LEAST_S = 1e-7  # of a prompt token: what is measured below is noise


class Pace:
    """Choose how many prompt tokens a pass may hold beside the turns that decode.

    A pass without prompt tokens is the yardstick: a pass takes about ``steps`` times as long at most. So the fixed cost of a pass,
    which is paid more often, makes a long prompt slower by at most a share of 1 / ``steps``. A server whose requests do not overlap
    is not slowed down: there, every pass may hold ``most`` tokens.
    """

    def __init__(self, most: int, steps: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        """most: prompt tokens of a pass in any case. steps: None = no bound by time. clock: seconds."""
        self._most, self._steps, self.clock = most, steps, clock
        self._step_s: float | None = None  # of a pass without prompt tokens
        self._token_s: float | None = None  # of a prompt token beside that
        self._overlapped_at: float | None = None

    def prompt_tokens(self, requests: int) -> int:
        """Return the prompt tokens that the next pass may hold. requests: under way and waiting."""
        if self._steps is None:
            return self._most
        now = self.clock()
        if requests > 1:
            self._overlapped_at = now
        if self._overlapped_at is None or now - self._overlapped_at > SHARED_S:
            return self._most
        if self._step_s is None:
            return min(self._most, _FIRST)
        if self._token_s is None:
            return self._most
        bound = (self._steps - 1) * self._step_s / self._token_s
        return self._most if bound >= self._most else max(1, int(bound / _MULTIPLE)) * _MULTIPLE

    def passed(self, prompt_tokens: int, seconds: float) -> None:
        """Take note of a pass: its prompt tokens, and how long it took."""
        if not prompt_tokens:
            self._step_s = _mean(self._step_s, seconds, _STEP_SHARE)
        elif prompt_tokens >= _MULTIPLE:
            beside = max(seconds - (self._step_s or 0.0), 0.0) / prompt_tokens
            self._token_s = _mean(self._token_s, max(beside, _LEAST_S), _TOKEN_SHARE)


def _mean(before: float | None, new: float, share: float) -> float:
    """Return a running mean. A value counts as at most twice and at least half the mean: one pass may have a reason of its own."""
    return (1 - share) * before + share * min(max(new, before / 2), 2 * before) if before else new
