"""Bound the time of a forward pass, so that short messages do not wait long for the pass of a long prompt."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARED_S = 10.0  # after requests overlapped, others are expected for so long
_STEP_SHARE, _TOKEN_SHARE = 0.25, 0.5  # what the newest pass counts in the running means
_MULTIPLE = 16  # budgets are multiples of it, so that kernels get few different shapes


class Pace:
    """Choose how many tokens a pass may hold.

    A pass without prompt tokens is the yardstick: a pass takes about ``steps`` times as long at most. So the fixed cost of a pass,
    which is paid more often, makes a long prompt slower by at most a share of 1 / ``steps``. A server whose requests do not overlap
    is not slowed down: there, every pass may hold ``most`` tokens.
    """

    def __init__(self, most: int, steps: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        """most: tokens of a pass in any case. steps: None = no bound by time. clock: seconds."""
        self._most, self._steps, self.clock = most, steps, clock
        self._step_s: float | None = None  # of a pass without prompt tokens
        self._token_s: float | None = None  # of a prompt token beside that
        self._overlapped_at: float | None = None

    def tokens(self, requests: int) -> int:
        """Return the tokens that the next pass may hold. requests: under way and waiting."""
        if self._steps is None:
            return self._most
        now = self.clock()
        if requests > 1:
            self._overlapped_at = now
        shared = self._overlapped_at is not None and now - self._overlapped_at <= SHARED_S
        if not shared or not self._step_s or not self._token_s:
            return self._most
        bound = (self._steps - 1) * self._step_s / self._token_s
        return min(self._most, max(1, int(bound / _MULTIPLE)) * _MULTIPLE)

    def passed(self, prompt_tokens: int, seconds: float) -> None:
        """Take note of a pass: its prompt tokens, and how long it took."""
        if not prompt_tokens:
            self._step_s = _mean(self._step_s, seconds, _STEP_SHARE)
        else:
            beside = max(0.0, seconds - (self._step_s or 0.0))
            self._token_s = _mean(self._token_s, beside / prompt_tokens, _TOKEN_SHARE)


def _mean(before: float | None, new: float, share: float) -> float:
    """Return a running mean. A value counts as at most twice the mean, since one pass may take long for a reason of its own."""
    return (1 - share) * before + share * min(new, 2 * before) if before else new
