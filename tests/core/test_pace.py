"""A bound on the time of passes holds whatever was measured before, and comes back from any noise."""

from __future__ import annotations

import random

import pytest

from loopserve.core.engine.pace import Pace

MOST = 512


def paced(steps: float = 4.0) -> Pace:
    return Pace(MOST, steps, clock=lambda: 0.0)


@pytest.mark.parametrize("tokens", [1, 8, 16, 512])
def test_passes_that_seem_to_cost_nothing_end_in_no_error(tokens: int) -> None:
    pace = paced()
    pace.passed(0, 0.06)
    for _ in range(20_000):
        pace.passed(tokens, 0.05)
        assert 1 <= pace.prompt_tokens(2) <= MOST


def test_the_bound_comes_back_within_few_passes() -> None:
    pace = paced()
    for _ in range(200):
        pace.passed(0, 0.06)
        pace.passed(64, 0.05)
    slow = 0
    while pace.prompt_tokens(2) > 64:
        pace.passed(pace.prompt_tokens(2), 0.06 + 0.003 * pace.prompt_tokens(2))
        slow += 1
    assert slow <= 40


def test_noise_of_small_pieces_does_not_move_the_bound() -> None:
    pace, draw = paced(), random.Random(0)
    for _ in range(50):
        pace.passed(0, 0.06)
        pace.passed(256, 0.06 + 0.001 * 256)
    before = pace.prompt_tokens(2)
    for _ in range(5000):
        pace.passed(2, 0.06 + draw.gauss(0, 0.004))
    assert pace.prompt_tokens(2) == before
    assert 128 <= before <= 192  # three steps of 60 ms at a millisecond per token


@pytest.mark.parametrize("requests", [0, 1])
def test_a_request_alone_is_not_bound(requests: int) -> None:
    pace = paced()
    pace.passed(0, 0.06)
    pace.passed(256, 10.0)
    assert pace.prompt_tokens(requests) == MOST
