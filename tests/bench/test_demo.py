"""The demonstration gives every promised figure, and they hang together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loopserve.api import load_stack
from loopserve.bench.demo import demo_dialogues, equal_budget, run_demo
from loopserve.bench.figures import plot_demo
from loopserve.core.errors import ConfigError

STACKS = ("dense", "loopserve", "snapkv", "streaming_llm")
PROMISED = {
    "asked", "right", "prefill_cell_density", "prefill_tile_density", "coverage_estimated", "coverage_realised",
    "attended_fraction", "ttft_ms", "tpot_ms", "kv_bytes_per_token", "store_bytes", "active_bytes", "fallbacks",
}  # fmt: skip


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    seen: list[tuple[str, int, int]] = []
    found = run_demo(stacks=STACKS, seed=0, tokens=800, turns=2, dialogues=1, progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[1] == step[2]] == [(stack, 3, 3) for stack in STACKS]
    return found


def test_every_promised_figure_is_there(result: dict[str, Any]) -> None:
    for figures in result["stacks"].values():
        assert figures.keys() >= PROMISED
        assert len(figures["turns"]) == 2
        assert all(turn.keys() >= PROMISED for turn in figures["turns"])


def test_figures_hang_together(result: dict[str, Any]) -> None:
    for name, figures in result["stacks"].items():
        assert figures["asked"] == 6 == sum(turn["asked"] for turn in figures["turns"])
        assert figures["right"] == sum(turn["right"] for turn in figures["turns"])
        assert 0 < figures["prefill_cell_density"] <= 1
        assert 0 < figures["coverage_realised"] <= 1 + 1e-6
        assert (figures["attended_fraction"] < 0.5) == (name != "dense")
        read, dense = figures["kv_bytes_per_token"], figures["dense_kv_bytes_per_token"]
        assert read == pytest.approx(sum(figures["kv_bytes_by_kind"].values()))
        assert (read < 0.8 * dense) == (name != "dense")
        assert (figures["active_bytes"] > 0) == (name != "dense")
    dense = result["stacks"]["dense"]
    assert dense["kv_bytes_per_token"] == dense["dense_kv_bytes_per_token"]
    assert dense["prefill_cell_density"] == dense["coverage_realised"] == 1.0


def test_the_sentence_names_every_stack_with_its_share(result: dict[str, Any]) -> None:
    for name, figures in result["stacks"].items():
        assert f"{name} answered {figures['right'] / figures['asked']:.0%} right" in result["summary"]


def test_it_can_be_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    plot_demo(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write the plot"):
        plot_demo(result, tmp_path / "nowhere" / "demo.png")


def test_dialogues_stand_at_every_position_and_ask_for_one_and_two_keys() -> None:
    made = demo_dialogues(seed=3, tokens=400, turns=2, dialogues=2)
    assert [turn.position for dialogue in made for turn in dialogue.turns[-1:]] == ["begin"] * 2 + ["middle"] * 2 + [
        "end"
    ] * 2
    assert {len(turn.keys) for dialogue in made for turn in dialogue.turns} == {1, 2}
    assert made == demo_dialogues(seed=3, tokens=400, turns=2, dialogues=2)


def test_every_stack_that_compresses_gets_the_same_budget() -> None:
    """But for those that count the answer in, which get as much more as the others attend to besides."""
    given = {name: equal_budget(load_stack(name), 2000, 3).describe()["decode"].get("budget") for name in STACKS}
    assert given.pop("streaming_llm") == given.pop("loopserve") == given["snapkv"] + 12
    budgets = set(given.values())
    assert len(budgets - {None}) == 1
    wrapped = equal_budget(load_stack("adakv"), 2000, 3).describe()["decode"]["inner"]["budget"]
    assert {wrapped} == budgets - {None}


def test_a_stack_whose_window_outgrows_a_tenth_says_so_and_one_that_can_shrink_shrinks() -> None:
    with pytest.raises(ConfigError, match="raise --tokens"):
        equal_budget(load_stack("snapkv"), 100, 3)
    small = equal_budget(load_stack("loopserve"), 100, 3).describe()["decode"]
    chosen = small["budget"] - small["sink_tokens"] - small["recent_window"] - small["page_budget"]
    assert small["page_budget"] >= 1 and chosen >= 1
