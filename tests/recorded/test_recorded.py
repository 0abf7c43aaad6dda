"""Every preset answers as it did when the recording was made, with the same figures.

The digests of the logits are for one machine (``python -m tests.recorded.conversations`` before and after a change): another
processor may round another way. Where that makes it choose another pair, its own recording lies beside: ``presets-avx2.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recorded.conversations import FIGURES, presets, record

FOLDER = Path(__file__).parent
RECORDED: dict[str, Any] = json.loads((FOLDER / "presets.json").read_text())
OTHERWISE: dict[str, Any] = json.loads((FOLDER / "presets-avx2.json").read_text())


def test_every_preset_is_recorded() -> None:
    assert sorted(RECORDED) == presets()


def test_other_recordings_differ_by_rounding_only() -> None:
    for preset, turns in OTHERWISE.items():
        for other, recorded in zip(turns, RECORDED[preset], strict=True):
            assert other["tokens"] == recorded["tokens"]
            assert other["last"] == pytest.approx(recorded["last"], abs=0.5)


@pytest.mark.parametrize("preset", presets())
def test_preset_answers_as_recorded(preset: str) -> None:
    found = record(preset)
    recordings = [RECORDED[preset], *([OTHERWISE[preset]] if preset in OTHERWISE else [])]
    differences = [different(found, recording) for recording in recordings]
    assert [] in differences, differences


def different(found: list[dict[str, Any]], recorded: list[dict[str, Any]]) -> list[str]:
    """Return what differs, by turn: tokens, the last logits beyond 0.01, figures beyond a thousandth."""
    differences = []
    for number, (one, other) in enumerate(zip(found, recorded, strict=True)):
        wanted = {"tokens": other["tokens"], "last": pytest.approx(other["last"], abs=1e-2)}
        for name in FIGURES:
            wanted[name] = other[name] if other[name] is None else pytest.approx(other[name], rel=1e-3)
        differences += [
            f"turn {number}, {name}: {one[name]}, recorded {value}"
            for name, value in wanted.items()
            if one[name] != value
        ]
    return differences
