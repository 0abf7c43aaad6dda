"""The bootstrap agrees with what theory says of means, and is the same for the same seed."""

from __future__ import annotations

from math import sqrt

import pytest

from loopserve.bench.bootstrap import bootstrap_error, bootstrap_interval, bootstrap_means

HALF = [0.0, 1.0] * 50


def test_the_error_of_a_share_is_that_of_theory() -> None:
    # sqrt(p (1 - p) / n) = sqrt(.25 / 100) = .05
    assert bootstrap_error(HALF) == pytest.approx(0.05, rel=0.1)


def test_answers_of_one_dialogue_count_as_one_draw() -> None:
    # Fifty dialogues of two equal answers each are fifty independent draws: sqrt(.25 / 50) = .0707
    values = [float(dialogue % 2) for dialogue in range(50) for _ in range(2)]
    clusters = [dialogue for dialogue in range(50) for _ in range(2)]
    assert bootstrap_error(values, clusters) == pytest.approx(sqrt(0.25 / 50), rel=0.1)
    assert bootstrap_error(values) == pytest.approx(0.05, rel=0.1)


def test_dialogues_of_different_sizes_weigh_as_many_answers_as_they_have() -> None:
    means = bootstrap_means([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert set(means) == {1.0, 0.75, 0.0}


def test_the_interval_holds_the_mean_and_widens_with_the_level() -> None:
    low, high = bootstrap_interval(HALF) or (0, 0)
    assert 0.35 < low < 0.5 < high < 0.65
    narrow = bootstrap_interval(HALF, level=0.5) or (0, 1)
    assert low < narrow[0] < 0.5 < narrow[1] < high


def test_the_seed_decides() -> None:
    assert bootstrap_means(HALF, seed=1) == bootstrap_means(HALF, seed=1) != bootstrap_means(HALF, seed=2)


def test_nothing_is_said_of_one_sample_or_one_dialogue() -> None:
    assert bootstrap_error([1.0]) is bootstrap_error([]) is bootstrap_error([0.0, 1.0], [7, 7]) is None
    assert bootstrap_interval([1.0]) is None and bootstrap_means([]) == []
    assert bootstrap_error([1.0, 1.0, 1.0]) == 0
