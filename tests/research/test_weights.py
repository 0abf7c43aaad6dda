"""The table of quantised weights, on the bundled model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from research import weights


def test_the_command_compares_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("the code of lisbon is amber falcon river . we had soup for lunch today . " * 8)
    for name, value in {"PROMPT": 60, "FORCED": 20, "STEPS": 3, "PROMPTS": 2}.items():
        monkeypatch.setattr(weights, name, value)
    monkeypatch.setattr(weights.torch, "set_num_threads", lambda _: None)  # other tests of this process keep theirs
    command = ["weights", "demo", "--text", str(text), "--dtype", "float32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    weights.main()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["weights"] for row in rows] == ["auto", "int8", "int4"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[0]["top1"] == 1
    assert 0 < rows[1]["kl"] < 0.05 and rows[1]["mebibytes"] < rows[0]["mebibytes"] / 2
    assert "| `int4` |" in capsys.readouterr().out
    monkeypatch.setattr(weights, "PROMPT", 10_000)
    with pytest.raises(SystemExit, match=r"tokens, 10020 are needed"):
        weights.main()
