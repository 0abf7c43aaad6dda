"""The page says what the rows say: verdicts turn when figures do, and the page that is kept is that of the rows that are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from research.evidence.units import Unit
from research.evidence_real import work
from research.evidence_real.__main__ import main
from research.evidence_real.comparison import BLOCK
from research.evidence_real.dialogues import TURNS
from research.evidence_real.ledger import Ledger
from research.evidence_real.page import LAST, render
from research.evidence_real.plan import FULL, QUICK, units_of

Kl = Callable[[dict[str, Any]], float]
MADE = {"device": "a machine", "threads": 1, "commit": "abc", "date": "2026-01-01", "torch": "2", "python": "3"}
COSTS = {
    "attended": 5.0, "attended_of": 100.0, "bytes": 10.0, "halved": 6.0, "before": 1.0, "dense": 100.0, "read": {}, "steps": 32,
    "compressed": 32, "held": 1, "store": 1,
}  # fmt: skip
PREFILL = {
    "cells": 0.1,
    "tiles": 0.2,
    "coverage": 0.97,
    "realised": 0.96,
    "ms": 900.0,
    "seconds": 1.0,
    "cells_by_layer": [],
}


def agreed(kl: float) -> dict[str, Any]:
    return {
        "tokens": 2 * BLOCK,
        "kl": [kl * BLOCK * 0.9, kl * BLOCK * 1.1],
        "same": [BLOCK, BLOCK - 2],
        "loss": [0.1, 0.1],
    }


def found(spec: dict[str, Any], kl: float) -> dict[str, Any]:
    kind = spec["kind"]
    if kind.startswith("needles"):
        right = 5 if spec["label"] in ("dense", "loopserve") else 1
        places = [(position, back) for position in ("begin", "middle", "end") for back in range(3)]
        answer = {"right": right, "of": 5, "attended": 0.05}
        return {"answers": [answer | {"position": position, "back": back} for position, back in places]}
    if kind == "dialogues":
        return {"turns": [agreed(kl) | {"costs": COSTS} for _ in range(TURNS)]}
    if kind == "claims":
        names = [f"{name}_{alpha}" for name in ("lines", "cells") for alpha in ("0.9", "0.95")]
        return {name: [[0.05, 0.15], [0.02, 0.04]] for name in (*names, "overlap", "held", "own")}
    parts = {"decode": {"costs": COSTS}, "prefill": {"prefill": PREFILL}, "both": {"costs": COSTS, "prefill": PREFILL}}
    return agreed(kl) | parts[kind]


def written(place: Path, units: Sequence[Unit], kl: Kl, date: str = "2026-01-01") -> Ledger:
    ledger = Ledger(place)
    for unit in units:
        made = MADE | {"date": date}
        ledger.add(
            {
                "experiment": unit.experiment,
                "unit": unit.spec,
                "found": found(unit.spec, kl(unit.spec)),
                "seconds": 1.0,
                "made": made,
            }
        )
    return ledger


def ours_is_best(spec: dict[str, Any]) -> float:
    return 0.004 if spec["label"].startswith(("loopserve", "as it is")) else 0.2


def verdict(text: str, claim: str) -> str:
    [line] = [each for each in text.splitlines() if each.startswith(f"| {claim}")]
    return line.split("|")[2].strip()


def test_every_section_is_there_and_nothing_is_missing(tmp_path: Path) -> None:
    units = units_of(FULL)
    text = render(written(tmp_path, units, ours_is_best), units)
    assert text.count("\n## ") == 10
    assert "not measured" not in text.lower().replace("not measured with", "")
    assert "Not measured" not in text
    assert "nan" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    for experiment in {unit.experiment for unit in units}:
        assert f"| {experiment} |" in text
    for share in (3, 5, 10):
        [line] = [each for each in text.splitlines() if f"{share} % of the pairs |" in each and "Numbers" in each]
        assert line.split("|")[2].strip() == "yes"
    assert "| too few to tell |" not in text


def test_verdicts_turn_with_the_figures(tmp_path: Path) -> None:
    units = [unit for unit in units_of(QUICK) if unit.experiment in ("decode", "needles")]
    good = render(written(tmp_path / "good", units, ours_is_best), units)
    bad = render(written(tmp_path / "bad", units, lambda spec: 0.3 if spec["label"] == "loopserve" else 0.1), units)
    for claim in ("Decoding under `loopserve` is at dense's level", "No other preset"):
        assert verdict(good, claim) == "yes"
        assert verdict(bad, claim) == "no"
    assert verdict(good, "Numbers stated turns before") == "too few to tell"
    assert verdict(good, "Sparse prefill is at dense's level") == "not measured"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    units = units_of(QUICK)
    text = render(written(tmp_path, units[:3], ours_is_best), units)
    decode = [unit for unit in units if unit.experiment == "decode"]
    assert f"decode at 1,024 tokens ({len(decode) - 3} of {len(decode)})" in text


def test_a_row_of_earlier_settings_is_not_shown_as_todays(tmp_path: Path) -> None:
    units = [unit for unit in units_of(QUICK) if unit.experiment == "decode"]
    ours = [unit for unit in units if unit.spec["label"] == "loopserve"]
    changed = [Unit(unit.experiment, unit.spec | {"stack": {"budget": 1}}) for unit in ours]
    ledger = written(tmp_path, [unit for unit in units if unit not in ours] + changed, ours_is_best)
    text = render(ledger, units)
    assert "| loopserve |" not in text
    assert "| snapkv |" in text
    assert "decode at 1,024 tokens (3 of 12)" in text
    assert verdict(text, "Decoding under `loopserve` is at dense's level") == "not measured"


def test_a_difference_within_its_error_is_none(tmp_path: Path) -> None:
    units = [unit for unit in units_of(FULL) if unit.experiment == "needles" and unit.spec["share"] == 0.05]

    def verdict_of(place: str, better: int) -> str:
        """Of how many of the dialogues the question at the end gives a digit more."""
        ledger = Ledger(tmp_path / place)
        for unit in units:
            answers = found(unit.spec, 0.0)["answers"]
            for answer in answers:
                answer["right"] = int(answer["position"] == "end" and unit.spec["seed"] < better)
            row = {
                "experiment": "needles",
                "unit": unit.spec,
                "found": {"answers": answers},
                "seconds": 1.0,
                "made": MADE,
            }
            ledger.add(row)
        return verdict(render(ledger, units), "Policies that watch the end")

    assert verdict_of("one", 1) == "no"
    assert verdict_of("all", 7) == "yes"


def test_a_setting_measured_on_one_kind_is_not_set_against_one_on_all(tmp_path: Path) -> None:
    """Here the smaller alpha was only measured where everything is easy."""
    units = [unit for unit in units_of(QUICK) if unit.experiment == "prefill"]
    all_kinds, easy = [
        [unit for unit in units if unit.spec["label"] == f"loopserve, alpha {alpha}"] for alpha in (0.98, 0.95)
    ]
    some = all_kinds + [unit for unit in easy if unit.spec["text"][0] == "prose"]
    text = render(written(tmp_path, some, lambda spec: 0.001 if spec["label"].endswith("0.95") else 0.1), units)
    assert verdict(text, "`loopserve`'s prefill is at dense's level") == "no"
    assert verdict(text, "No other prefill policy") == "not measured"


def test_of_two_rows_of_a_unit_the_later_counts(tmp_path: Path) -> None:
    units = [unit for unit in units_of(QUICK) if unit.spec["label"] == "loopserve" and unit.experiment == "decode"]
    written(tmp_path, units, lambda spec: 0.3, "2026-01-03")
    text = render(written(tmp_path, units, lambda spec: 0.1, "2026-01-02"), units)
    assert "0.3000" in text
    assert "0.1000" not in text


def test_one_kind_of_text_is_too_few_for_a_verdict(tmp_path: Path) -> None:
    units = [unit for unit in units_of(QUICK) if unit.experiment in ("decode", "prefill", "both")]
    prose = [unit for unit in units if unit.spec["text"][0] == "prose"]
    text = render(written(tmp_path, prose, ours_is_best), units)
    claims = ("Decoding under `loopserve`", "No other preset", "Both phases", "No other prefill policy")
    assert [verdict(text, claim) for claim in claims] == ["too few to tell"] * len(claims)


def test_the_page_that_is_kept_is_that_of_the_rows_that_are_kept() -> None:
    """Written anew by ``make evidence-real ARGS=--render``."""
    text = render(Ledger(Path("benchmarks/results/evidence-real")), units_of(FULL))
    kept = Path("docs/evidence.md").read_text(encoding="utf-8")
    assert kept.partition(LAST)[0] == text.partition(LAST)[0]


def test_the_command_runs_what_is_missing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def fake(model: str, units: list[Unit]) -> list[tuple[Unit, dict[str, Any]]]:
        calls.append(len(units))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [(unit, found(unit.spec, 0.01)) for unit in units]

    for kind in work.KINDS:
        monkeypatch.setitem(work.KINDS, kind, fake)
    place = ["--quick", "--workers", "1", "--results", str(tmp_path / "rows"), "--page", str(tmp_path / "evidence.md")]
    assert main(place) == 130
    assert main(place) == 0
    assert sum(calls) - calls[1] == len(units_of(QUICK))
    assert "Not measured" not in (tmp_path / "evidence.md").read_text(encoding="utf-8").partition(LAST)[2]
    assert main(place) == 0
    assert "0:00" in capsys.readouterr().err


def test_a_stack_that_fails_is_named_and_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(model: str, units: list[Unit]) -> list[tuple[Unit, dict[str, Any]]]:
        if any(unit.spec["label"] == "quest" for unit in units):
            raise ValueError("it broke")
        return [(unit, found(unit.spec, 0.01)) for unit in units]

    for kind in work.KINDS:
        monkeypatch.setitem(work.KINDS, kind, fake)
    place = ["--quick", "--workers", "1", "--results", str(tmp_path / "rows"), "--page", str(tmp_path / "evidence.md")]
    assert main(place) == 1
    text = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert "Failed" in text
    assert "quest: ValueError: it broke" in text
    assert "| snapkv |" in text


def test_stacks_are_compared_on_the_texts_that_both_were_measured_on(tmp_path: Path) -> None:
    """Means over different texts do not compare: here the rival was only measured where everything is easy."""
    units = [unit for unit in units_of(QUICK) if unit.experiment == "decode"]
    some = [unit for unit in units if unit.spec["label"] in ("loopserve", "snapkv")]
    some = [unit for unit in some if unit.spec["label"] == "loopserve" or unit.spec["text"][0] != "code"]

    def easy_prose(spec: dict[str, Any]) -> float:
        return 0.01 * (1 if spec["label"] == "loopserve" else 2) * (10 if spec["text"][0] == "code" else 1)

    text = render(written(tmp_path, some, easy_prose), some)
    assert verdict(text, "No other preset") == "yes"
    assert "KL 0.0200" in text
    assert "against 0.0100 on the same texts" in text
