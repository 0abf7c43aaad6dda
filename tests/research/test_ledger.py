"""Stored units survive a killed run, and a complete run replaces the one before as a whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from loopserve.core.errors import ConfigError
from research.evidence.ledger import Ledger, read, rows_of
from research.evidence.units import Unit

PLAN = [Unit(name, {"kind": "talk", "label": f"{name} {number}"}) for name in ("one", "two") for number in range(4)]


def row(unit: Unit, found: Any = 0) -> dict[str, Any]:
    return {"experiment": unit.experiment, "unit": unit.spec, "found": found, "seconds": 0.0, "made": {}}


def fill(ledger: Ledger, units: list[Unit]) -> None:
    for unit in units:
        ledger.add(row(unit))


def test_a_complete_run_is_sorted_as_planned(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, PLAN)
    fill(ledger, list(reversed(PLAN)))
    assert [each["unit"] for each in rows_of(tmp_path, "one")] == [unit.spec for unit in PLAN[:4]]
    assert not list(tmp_path.glob("*.part.jsonl"))
    assert rows_of(tmp_path, "three") == []


@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_any_byte_goes_on_to_the_same_file(tmp_path: Path, seed: int) -> None:
    whole = Ledger(tmp_path / "whole", PLAN[:4])
    fill(whole, PLAN[:4])
    killed = Ledger(tmp_path / "killed", PLAN[:4])
    fill(killed, PLAN[:3])
    part = tmp_path / "killed" / "one.part.jsonl"
    text = part.read_bytes()
    part.write_bytes(text[: random.Random(seed).randrange(len(text) + 1)])
    resumed = Ledger(tmp_path / "killed", PLAN[:4])
    waiting = resumed.waiting(PLAN[:4])
    assert 1 <= len(waiting) <= 4
    fill(resumed, waiting)
    assert (tmp_path / "killed" / "one.jsonl").read_bytes() == (tmp_path / "whole" / "one.jsonl").read_bytes()


def test_the_last_complete_run_is_shown_until_the_next_is_complete(tmp_path: Path) -> None:
    fill(Ledger(tmp_path, PLAN), PLAN)
    again = Ledger(tmp_path, PLAN)
    assert again.waiting(PLAN) == PLAN  # a run that ended is done anew
    for unit in PLAN[:-1]:
        again.add(row(unit, found=1))
    assert {each["found"] for name in ("one", "two") for each in rows_of(tmp_path, name)} == {0}
    resumed = Ledger(tmp_path, PLAN)
    assert resumed.waiting(PLAN) == PLAN[-1:]  # experiments that are whole wait for the others
    resumed.add(row(PLAN[-1], found=1))
    assert {each["found"] for name in ("one", "two") for each in rows_of(tmp_path, name)} == {1}


def test_units_that_changed_are_done_again_and_fresh_forgets_all(tmp_path: Path) -> None:
    fill(Ledger(tmp_path, PLAN), PLAN[:2])
    changed = [Unit("one", {**PLAN[0].spec, "seed": 1}), *PLAN[1:]]
    assert Ledger(tmp_path, changed).waiting(changed) == [changed[0], *changed[2:]]
    assert Ledger(tmp_path, changed, fresh=True).waiting(changed) == changed


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    fill(Ledger(tmp_path, PLAN), PLAN[:2])
    part = tmp_path / "one.part.jsonl"
    part.write_text("[]\n" + part.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"one\.part\.jsonl:1: not a result row"):
        Ledger(tmp_path, PLAN)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="results cannot be kept there"):
        Ledger(tmp_path / "file" / "rows", PLAN)


def test_no_file_gives_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "absent.jsonl") == []
