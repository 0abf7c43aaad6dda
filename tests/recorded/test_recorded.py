"""Every preset answers as it did when the recording was made, with the same figures.

The digests of the logits are for one machine (``python -m tests.recorded.conversations`` before and after a change): another
processor may round another way, and a pair that is selected by a hair's breadth there may not be selected here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recorded.conversations import FIGURES, presets, record

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "presets.json").read_text())


def test_every_preset_is_recorded() -> None:
    assert sorted(RECORDED) == presets()


@pytest.mark.parametrize("preset", presets())
def test_preset_answers_as_recorded(preset: str) -> None:
    for found, recorded in zip(record(preset), RECORDED[preset], strict=True):
        assert found["tokens"] == recorded["tokens"]
        assert found["last"] == pytest.approx(recorded["last"], abs=0.4)
        for name in FIGURES:
            wanted = recorded[name]
            assert found[name] == (wanted if wanted is None else pytest.approx(wanted, rel=1e-3)), name
