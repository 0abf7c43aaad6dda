"""Means, errors and paired differences against values known otherwise."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from loopserve.bench.quality.records import Run
from loopserve.bench.quality.summary import chance, gather, interval, mean, standard_error
from loopserve.bench.quality.tables import Difference, compare_runs, compare_stacks
from loopserve.core.errors import ConfigError


def records(scores: dict[str, list[list[float]]], stack: str = "a") -> list[dict[str, Any]]:
    """By task, a list of dialogues, each a list of its turns' scores."""
    return [
        {
            "stack": stack, "task": task, "sample": str(sample), "turn": turn, "score": score, "gold": ["x"],
            "position": ("begin", "end")[sample % 2], "labels": {},
        }
        for task, dialogues in scores.items()
        for sample, turns in enumerate(dialogues)
        for turn, score in enumerate(turns)
    ]  # fmt: skip


def gathered(scores: dict[str, list[list[float]]]) -> Any:
    return gather(records(scores), lambda record: record["score"])


def test_a_mean_over_tasks_does_not_let_the_larger_one_outvote_the_smaller() -> None:
    assert mean(gathered({"large": [[1.0]] * 9, "small": [[0.0]]})) == 0.5
    assert mean(gathered({"uneven": [[1.0, 1.0, 1.0], [0.0]]})) == 0.75
    assert mean({}) is None


def test_the_error_is_that_of_independent_dialogues() -> None:
    draw = Random(0)
    scores = [[float(draw.random() < 0.7)] for _ in range(200)]
    share = sum(score for (score,) in scores) / 200
    wanted = (share * (1 - share) / 200) ** 0.5
    assert standard_error(gathered({"t": scores})) == pytest.approx(wanted, rel=0.05)
    # Turns of a dialogue that all say the same say no more than one.
    assert standard_error(gathered({"t": [each * 5 for each in scores]})) == pytest.approx(wanted, rel=0.05)
    two = standard_error(gathered({"t": scores, "u": scores}))
    assert two == pytest.approx(wanted / 2**0.5, rel=0.05)
    low, high = interval(gathered({"t": scores})) or (0, 0)
    assert low < share < high and high - low == pytest.approx(2 * 1.96 * wanted, rel=0.1)


def test_one_dialogue_says_nothing_of_its_error() -> None:
    assert standard_error(gathered({"t": [[1.0, 0.0]]})) is None and interval(gathered({"t": [[1.0]]})) is None


def test_chance_counts_the_signs() -> None:
    assert chance(gathered({"t": [[1.0]] * 6})) == 2 / 64
    assert chance(gathered({"t": [[1.0]] * 3 + [[-1.0]]})) == (2 + 2 * 4) / 16
    assert chance(gathered({"t": [[0.0]] * 5})) == 1.0
    assert chance(gathered({"t": [[0.1]] * 40})) < 0.001


def run(**stacks: dict[str, list[list[float]]]) -> Run:
    found = [record for name, scores in stacks.items() for record in records(scores, name)]
    return Run({"lineup": list(stacks)}, [], found)


def by_group(differences: list[Difference]) -> dict[str, Difference]:
    return {each.group: each for each in differences}


def test_a_difference_is_separated_from_noise() -> None:
    worse, better = [[0.0, 1.0]] * 12, [[1.0, 1.0]] * 12
    found = by_group(compare_stacks(run(a={"t": worse}, b={"t": better}), "a", "b"))
    assert (
        found["all"].verdict == found["turn 1"].verdict == "B is better" and found["turn 2"].verdict == "no difference"
    )
    assert found["all"].difference == 0.5 and (found["all"].low, found["all"].high) == (0.5, 0.5)
    assert by_group(compare_stacks(run(a={"t": better}, b={"t": worse}), "a", "b"))["begin"].verdict == "A is better"
    draw = Random(1)
    noisy = [[float(draw.random() < 0.5)] for _ in range(40)], [[float(draw.random() < 0.5)] for _ in range(40)]
    assert by_group(compare_stacks(run(a={"t": noisy[0]}, b={"t": noisy[1]}), "a", "b"))["all"].verdict == "noise"
    few = by_group(compare_stacks(run(a={"t": worse[:5]}, b={"t": better[:5]}), "a", "b"))
    assert few["all"].verdict == "too few dialogues to tell (at least 6)"


def test_noise_is_called_a_difference_about_as_rarely_as_it_says() -> None:
    draw, wrong = Random(2), 0
    for _ in range(200):
        a, b = ([[float(draw.random() < 0.6)] for _ in range(20)] for _ in "ab")
        wrong += "better" in by_group(compare_stacks(run(a={"t": a}, b={"t": b}), "a", "b"))["all"].verdict
    assert wrong <= 16  # 5 % would be 10, with a standard deviation of 3


def test_only_questions_of_both_sides_are_compared() -> None:
    a, b = run(a={"t": [[1.0]] * 8, "u": [[1.0]]}), run(a={"t": [[0.0]] * 6}, other={"t": [[0.0]]})
    assert {each.stack for each in compare_runs(a, b)} == {"a"}
    assert by_group(compare_runs(a, b))["all"].turns == 6
    with pytest.raises(ConfigError, match="no stack in common"):
        compare_runs(a, run(b={"t": [[0.0]]}))
    with pytest.raises(ConfigError, match="no question was asked on both sides"):
        compare_runs(a, run(a={"v": [[0.0]]}))
    with pytest.raises(ConfigError, match="the run has no stack 'b' "):
        compare_stacks(a, "a", "b")
    b.records[0]["gold"] = ["y"]
    with pytest.raises(ConfigError, match="other gold answers"):
        compare_runs(a, b)
