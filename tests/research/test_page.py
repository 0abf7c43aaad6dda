"""The page says what the rows say: verdicts turn when answers do, and the same rows give the same page."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from research.evidence import concentration, goal, page, position, turns, work
from research.evidence.__main__ import main
from research.evidence.pictures import Pictures
from research.evidence.plan import QUICK, units_of
from research.evidence.units import Row, Unit

Chance = Callable[[dict[str, Any]], float]


def talked(spec: dict[str, Any], right: float) -> dict[str, Any]:
    """Answers of which the first share of each part index is right, and costs that the budget suggests."""
    keys = spec["task"]["keys"] * spec["task"].get("chain", 1)
    count = spec["dialogues"] * spec["task"]["turns"]
    dense = spec["label"] in ("full", "dense")
    good = [int(index < round(right * count)) for index in range(count)]
    distances = [[min(index % spec["task"]["turns"], 2)] * spec["task"]["keys"] for index in range(count)]
    share = 1.0 if dense else {4: 0.4}.get(spec["stack"]["decode"].get("page", 0), 0.15)
    return {
        "answers": {
            "turn": [index % spec["task"]["turns"] for index in range(count)],
            "right": good,
            "parts": [[each] * keys for each in good],
            "distances": distances,
            "outputs": [12] * count,
            "ttft_ms": [100.0 + index for index in range(count)],
            "kept": [[0.25 if far else None for far in each] for each in distances],
        },
        "sums": {
            "steps": 11.0 * count, "compressed_steps": 0.0 if dense else 11.0 * count, "decode_ms": 50.0, "bytes": share,
            "observation_bytes": 0.0, "dense_bytes": 1.0, "attended": share, "attended_of": 1.0, "cells": 0.2, "cells_of": 1.0,
            "tiles": 0.3, "tiles_of": 1.0, "realised": 0.9, "realised_of": 1.0,
        },
    }  # fmt: skip


def found(spec: dict[str, Any], right: float) -> dict[str, Any]:
    if spec["kind"] == "talk":
        return talked(spec, right)
    if spec["kind"] == "coverage":
        figures = dict.fromkeys(("cells", "tiles", "mean", "worst", "held_out", "held_out_worst", "question"), 0.5)
        return {label: {**figures, "lines": [[9, 8], [7, 6]]} for label in spec["policies"]}
    if spec["kind"] == "overlap":
        figures = {name: [0.25, 0.35] for name in ("verticals", "slashes", "both", "chance", "held")}
        return {pair: {**figures, "own": [0.9, 0.9]} for pair in ("inputs", "turns", "halves")}
    if spec["kind"] == "attention_map":
        lines = {"verticals": [0, 9], "slashes": [0, 3], "cells": 0.2, "held": 0.95}
        return {"layer": 1, "head": 2, "rows": 16, "columns": 24, "map": ["091", "123"], **lines}
    shares = {name: [[0.02, 0.04], [0.06, 0.08]] for name in ("fewest", "by_length", "cells")}
    return {block: {str(alpha): shares for alpha in concentration.ALPHAS} for block in ("whole", "turn")}


def rows_with(chance: Chance, *experiments: str) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {name: [] for name in page.EXPERIMENTS}
    made = {"device": "a machine", "threads": 1, "commit": "abc", "date": "2026-01-01", "torch": "2"}
    for unit in UNITS:
        if not experiments or unit.experiment in experiments:
            result = found(unit.spec, chance(unit.spec))
            rows[unit.experiment].append(
                {"experiment": unit.experiment, "unit": unit.spec, "found": result, "seconds": 1.0, "made": made}
            )
    return rows


UNITS = units_of(QUICK)


def perfect(spec: dict[str, Any]) -> float:
    return 1.0


def windows_fail(spec: dict[str, Any]) -> float:
    """SnapKV and its kin fail unless the question stands at the end."""
    watching = str(spec["label"]).startswith(("snapkv", "adakv", "pyramidkv", "chunkkv", "criticalkv"))
    return 0.0 if watching and spec["task"].get("position") != "end" else 1.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    place = tmp_path_factory.mktemp("page")
    return page.render(rows_with(windows_fail), Pictures(place / "evidence", place / "evidence.md"), place), place


def test_every_section_is_there_and_every_picture_is_there(whole: tuple[str, Path]) -> None:
    text, place = whole
    assert text.count("\n## ") == 10
    assert "Not run" not in text
    assert "nan" not in text
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(shown) == len(set(shown)) == 10
    for link in shown:
        assert (place / link).read_text(encoding="utf-8").startswith("<?xml")


def test_tables_are_whole(whole: tuple[str, Path]) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", whole[0], re.MULTILINE):
        widths = {line.count("|") for line in block.splitlines()}
        assert len(widths) == 1, block


def test_without_rows_every_section_says_so(tmp_path: Path) -> None:
    empty: dict[str, list[Row]] = {name: [] for name in page.EXPERIMENTS}
    text = page.render(empty, Pictures(tmp_path, tmp_path / "page.md"), tmp_path)
    assert text.count("Not run to its end.") == 9


def test_the_same_rows_give_the_same_page_and_pictures(tmp_path: Path) -> None:
    made = []
    for name in ("one", "other"):
        pictures = Pictures(tmp_path / name / "evidence", tmp_path / name / "evidence.md")
        text = page.render(rows_with(perfect, concentration.NAME), pictures, tmp_path)
        made.append((text, (tmp_path / name / "evidence" / "concentration.svg").read_bytes()))
    assert made[0] == made[1]


def test_windows_that_fail_early_questions_are_seen(whole: tuple[str, Path], tmp_path: Path) -> None:
    claim = "methods that watch the end of the prompt lose answers when the question stands earlier"
    assert f"**Holds, here:** {claim}" in whole[0]
    rows = rows_with(perfect, position.NAME)[position.NAME]
    assert f"**Does not hold, here:** {claim}" in position.section(rows, Pictures(tmp_path, tmp_path / "page.md"))


def test_a_rival_that_reads_less_at_densest_level_is_named(tmp_path: Path) -> None:
    def pages_of_16(spec: dict[str, Any]) -> float:
        return 1.0 if spec["label"] in ("full", "quest, pages of 16", "quest, pages of 4") else 0.5

    rows = rows_with(pages_of_16, position.NAME)[position.NAME]
    text = position.section(rows, Pictures(tmp_path, tmp_path / "page.md"))
    assert "**Does not hold, here:** at dense's level over all positions `quest, pages of 16` reads least, 15 %" in text


def test_the_bar_is_met_or_not(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path, tmp_path / "page.md")
    met = goal.section(rows_with(perfect, goal.NAME)[goal.NAME], pictures)
    assert met.startswith("**Holds, here:**")
    assert "| yes |" in met

    def dense_only(spec: dict[str, Any]) -> float:
        return 1.0 if spec["label"] == "dense" else 0.6

    missed = goal.section(rows_with(dense_only, goal.NAME)[goal.NAME], pictures)
    assert missed.startswith("**Does not hold, here:** no stack tried meets the bar")
    assert "| yes |" not in missed


def test_eviction_that_costs_answers_is_reported(tmp_path: Path) -> None:
    def forgetful(spec: dict[str, Any]) -> float:
        return 0.25 if spec.get("kept") == "evict" else 1.0

    text = turns.section(rows_with(forgetful, turns.NAME)[turns.NAME], Pictures(tmp_path, tmp_path / "page.md"))
    assert "**Holds, here:** in turn 3 eviction loses answers" in text
    assert "`snapkv` 100 % with everything kept, 0 % with eviction (-100 points)" in text


def test_the_command_runs_renders_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--results", str(tmp_path / "rows"), "--page", str(tmp_path / "evidence.md")]
    wanted = ["--quick", "--workers", "1", "--only", "overlap", *place]
    monkeypatch.setitem(work.KINDS, "overlap", lambda spec: 1 / 0)
    assert main(wanted) == 1
    assert "failed: overlap: dialogue 0: division by zero" in capsys.readouterr().err
    monkeypatch.setitem(work.KINDS, "overlap", lambda spec: found(spec, 1.0))
    assert main(wanted) == 0
    text = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert "the lines of two inputs overlap by 30.0 %" in text
    assert main(["--quick", "--render", *place]) == 0
    assert (tmp_path / "evidence.md").read_text(encoding="utf-8") == text
    assert main(["--quick", "--only", "overlap", "--results", str(tmp_path / "evidence.md")]) == 1
    assert "error:" in capsys.readouterr().err


def test_units_run_in_processes_as_they_do_here(tmp_path: Path) -> None:
    spec = {
        "kind": "overlap",
        "label": "small",
        "model": "demo",
        "task": {"tokens": 300, "turns": 3, "keys": 1},
        "seed": 1,
    }
    units = [Unit("overlap", {**spec, "seed": seed}) for seed in (1, 2)]
    alone = {unit.key: row["found"] for unit, row in work.run_all(units, 1) if isinstance(row, dict)}
    shared = {unit.key: row["found"] for unit, row in work.run_all(units, 2) if isinstance(row, dict)}
    assert alone == shared
    assert len(alone) == 2
