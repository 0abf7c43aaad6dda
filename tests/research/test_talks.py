"""Answers are judged part by part, costs add up over units, and what eviction took is seen."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loopserve.api import load_stack
from research.evidence.conversations import hold, parts_right
from research.evidence.recipes import DENSE, FULL, decode_policies, decode_preset, observing, prefill_policies
from research.evidence.talks import at_positions, talk, tallies
from research.evidence.tally import Share, Tally, paired, with_error

TASK: dict[str, Any] = {"tokens": 300, "turns": 2, "keys": 2, "position": "end"}


def held(decode: dict[str, Any], **more: Any) -> dict[str, Any]:
    spec = talk("tests", "x", {"prefill": DENSE, "decode": decode}, TASK, 4, seed=3, survival=True, **more).spec
    return {"unit": spec, "found": hold(spec)}


@pytest.fixture(scope="module")
def dense() -> dict[str, Any]:
    return held(FULL)


@pytest.fixture(scope="module")
def evicting() -> dict[str, Any]:
    return held({"policy": "streaming_llm", "budget": 24, "retention": "evict"})


def test_a_part_counts_wherever_it_stands() -> None:
    gold = "lisbon is amber falcon . paris is river . oslo is mist ."
    assert parts_right(gold, gold) == [1, 1, 1]
    assert parts_right("paris is river . lisbon is amber falcon .", gold) == [1, 1, 0]
    assert parts_right("lisbon is amber .", gold) == [0, 0, 0]
    assert parts_right("lisbon is amber falcon", "lisbon is amber falcon .") == [1]
    assert parts_right("", gold) == [0, 0, 0]


def test_dense_reads_what_dense_reads(dense: dict[str, Any]) -> None:
    tally = Tally.of([dense])
    assert tally.right().asked == 8
    assert tally.right().value >= 0.75
    assert tally.attended == tally.bytes_of_steps == tally.bytes_of_all == tally.cells == 1.0
    assert tally.compressed == 0.0
    assert len({len(values) for values in dense["found"]["answers"].values()}) == 1
    assert tally.turns() == [0, 1]


def test_what_is_kept_survives_and_what_slid_out_does_not(dense: dict[str, Any], evicting: dict[str, Any]) -> None:
    """Facts of the first turn, asked for in the second, are what an evicting window has lost."""

    def survivors(row: dict[str, Any]) -> list[float]:
        return [kept for answer in Tally.of([row]).answers for kept in answer["kept"] if kept is not None]

    older = [far for answer in Tally.of([dense]).answers for far in answer["distances"] if far]
    assert survivors(dense) == [1.0] * len(older) != []
    assert sum(survivors(evicting)) < 0.5 * len(older)
    assert Tally.of([evicting]).sums["store_bytes"] < Tally.of([dense]).sums["store_bytes"]


def test_costs_are_sums_over_units(evicting: dict[str, Any]) -> None:
    once, twice = Tally.of([evicting]), Tally.of([evicting, evicting])
    assert twice.bytes_of_all == pytest.approx(once.bytes_of_all)
    assert twice.sums["steps"] == 2 * once.sums["steps"]
    assert twice.sums["store_bytes"] == once.sums["store_bytes"]
    assert twice.right().asked == 2 * once.right().asked


def test_an_observing_policy_reads_before_the_first_output() -> None:
    tally = Tally.of([held(observing(48, 4))])
    assert tally.bytes_of_steps is not None
    assert tally.bytes_of_all is not None
    assert tally.bytes_of_steps < tally.bytes_of_all < 1.0
    assert tally.compressed == 1.0


def test_a_share_is_never_certain() -> None:
    assert Share(36, 36).error == pytest.approx(math.sqrt(37 / 38 * 1 / 38 / 38))
    assert Share(0, 10).error == pytest.approx(Share(10, 10).error)
    assert Share(0, 10).error > 0
    assert Share(5, 10).with_error == "50 ± 14"
    assert str(Share(0, 0)) == "-"
    assert with_error([0.1, 0.3]) == "20.0 ± 10.0 %"
    assert with_error([0.1]) == "10.0 %"


def test_differences_are_paired_by_dialogue() -> None:
    def tally(right: list[int]) -> Tally:
        return Tally([{"right": each, "dialogue": number // 2} for number, each in enumerate(right)])

    difference, error = paired(tally([1, 1, 0, 1]), tally([0, 1, 0, 0]))
    assert (difference, error) == (0.5, 0.0)  # half an answer in each dialogue
    difference, error = paired(tally([1, 1, 0, 0]), tally([0, 0, 0, 0]))
    assert difference == 0.5
    assert error == pytest.approx(0.5)


def test_every_position_is_a_unit_and_rows_join_by_label(dense: dict[str, Any]) -> None:
    units = at_positions("tests", "x", {"prefill": DENSE, "decode": FULL}, TASK, 1, seed=0)
    assert [unit.spec["task"]["position"] for unit in units] == ["begin", "middle", "end"]
    assert len({unit.key for unit in units}) == 3
    assert tallies([dense, dense])["x"].right().asked == 16


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_every_decode_policy_is_a_stack_at_its_share(share: float) -> None:
    for label, decode in decode_policies(share, 1333, 6).items():
        described = load_stack({"version": 1, "name": "x", "prefill": DENSE, "decode": decode}).describe()["decode"]
        while "inner" in described:
            described = described["inner"]
        if "budget" in described:
            assert described["budget"] <= share * 1333 + 1, label


def test_every_prefill_policy_is_a_stack() -> None:
    for settings in prefill_policies(800).values():
        for policy in settings.values():
            load_stack({"version": 1, "name": "x", "prefill": policy, "decode": FULL})


def test_a_preset_keeps_its_share_for_the_current_query() -> None:
    decode = decode_preset("loopserve", 100)
    assert (decode["budget"], decode["page_budget"]) == (100, 87)
    assert decode_preset("adakv", 100)["inner"]["budget"] == 100
