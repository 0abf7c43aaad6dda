"""Reports: rows as tables, break-even lengths, plots, and the README's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopserve.bench.report import COLUMNS, break_even, crossing, line, markdown, renew, table
from loopserve.bench.rows import Row, append_rows, latest, read_rows
from loopserve.cli import main
from loopserve.core.errors import ConfigError

WHERE = {
    "threads": 2,
    "device": "A CPU",
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
}


def prefill_row(tokens: int, ratio: float, **changes: Any) -> Row:
    shape = {"q_heads": 8, "kv_heads": 8, "m": tokens, "n": tokens, "head_dim": 64}
    times = {"median_ms": 250.0, "q20_ms": 240.0, "q80_ms": 260.0, "sdpa_ms": 250.0 * ratio}
    row = {"op": "sparse_prefill", "shape": shape, "dtype": "float32", "data": "structured, seed 0", "impl": "torch"}
    row |= {"pattern": {"cell_density": 0.104}, "parity": "ok", "ratio_sdpa": ratio, "ratio_own_dense": 2.5}
    return {**row, **times, "rel_err": 0.05, "rel_err_pattern": 1e-6, **WHERE, **changes}


def step_row(tokens: int, stack: str, ms: float) -> Row:
    shape = {"layers": 12, "q_heads": 12, "kv_heads": 4, "m": 1, "n": tokens, "head_dim": 64}
    return prefill_row(
        tokens, 1.0, op="decode_step", shape=shape, stack=stack, median_ms=ms, growth=1.5, growth_from=8192
    )


FAILED = {**prefill_row(4096, 1.0, op="vertical_slash"), "parity": "failed", "error": "worst row 1e+00"}
FAILED = {key: value for key, value in FAILED.items() if "ratio" not in key and not key.endswith("_ms")}


def test_a_line_says_all(tmp_path: Path) -> None:
    said = dict(zip(COLUMNS, line(prefill_row(16384, 12.34, scaled_from_heads=2)), strict=True))
    assert said == {
        "op": "sparse_prefill",
        "case": "8/8 heads, D 64, 16K",
        "dtype": "float32",
        "by": "torch",
        "density": "10.4%",
        "ms (20-80 %)": "250 (240-260)",
        "x SDPA": "12.3",
        "x own dense": "2.50",
        "error": "1e-06",
        "note": "dense on 2 heads, scaled",
    }
    assert line(step_row(65536, "dense", 9.5))[1] == "12 layers, 12/4 heads, D 64, 64K"
    assert line(step_row(65536, "dense", 9.5))[-1] == "1.50 times 8K"
    assert line(FAILED)[-1] == "PARITY FAILED: worst row 1e+00" and line(FAILED)[5:8] == ("-", "-", "-")


def test_files_are_appended_to_and_the_newest_row_counts(tmp_path: Path) -> None:
    file = tmp_path / "results" / "mine.jsonl"
    append_rows(file, [prefill_row(8192, 1.0), prefill_row(16384, 2.0)])
    append_rows(file, [prefill_row(8192, 3.0, commit="def")])
    rows = read_rows(file)
    assert [row["ratio_sdpa"] for row in rows] == [1.0, 2.0, 3.0]
    assert [row["ratio_sdpa"] for row in latest(rows)] == [3.0, 2.0]
    assert len(table(rows)) == 2 and not table(rows, ("decode_step",))
    file.write_text('{"op": "x"}\n')
    with pytest.raises(ConfigError, match=r"mine\.jsonl:1: not a result row: it has no 'device'"):
        read_rows(file)
    file.write_text(json.dumps(prefill_row(8192, 1.0)) + "\nnot json\n")
    with pytest.raises(ConfigError, match=r"mine\.jsonl:2: not a JSON row"):
        read_rows(file)


def test_break_even_lies_between_the_lengths_around_it() -> None:
    rows = [prefill_row(4096, 0.5), prefill_row(16384, 2.0), prefill_row(8192, 3.0, dtype="bfloat16")]
    assert crossing([(4096, 0.5), (16384, 2.0)]) == 8192
    assert break_even(rows) == [
        "D 64, bfloat16, torch, structured: faster at 8K, the shortest measured",
        "D 64, float32, torch, structured: from about 8K on",
    ]
    assert break_even([prefill_row(4096, 0.25)])[0].endswith("not up to 4K (0.25 times as fast there)")


def test_the_readme_can_show_some_rows_with_their_machine(tmp_path: Path) -> None:
    steps = [step_row(tokens, stack, 9.5) for tokens in (8192, 16384) for stack in ("dense", "loopserve")]
    append_rows(tmp_path / "r.jsonl", [prefill_row(16384, 12.34), *steps])
    text = "a\n<!-- speed: r.jsonl decode_step 16384 -->\nold\n<!-- end of speed -->\nb"
    made = renew(text, tmp_path)
    (row,) = [line for line in made.splitlines() if line.startswith("| decode_step |")]
    assert "16K" in row and "| loopserve |" in row, "long enough, and not what it is held against"
    assert "sparse_prefill" not in made and "old" not in made
    assert "A CPU; 2 thread(s); torch 2.13.0, triton 3.9.0; commit abc; 2026-01-02" in made
    assert renew(made, tmp_path) == made and made.endswith("\nb")
    assert "No rows." in markdown([])


def test_report_prints_tables_and_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "r.jsonl"
    steps = [step_row(tokens, stack, tokens / 1e3) for tokens in (8192, 16384) for stack in ("dense", "loopserve")]
    append_rows(file, [prefill_row(4096, 0.5), prefill_row(16384, 2.0), FAILED, *steps])

    def report(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(("bench", "report", str(file), *arguments))
        assert ended.value.code == 0
        return capsys.readouterr().out

    human = report("--plots", str(tmp_path / "plots"))
    assert "PARITY FAILED" in human and "from about 8K on" in human and "A CPU" in human
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"time_by_length.png", "tpot_by_history.png"}
    assert report("--markdown", "--only", "decode_step").count("| decode_step |") == 4
    assert len(json.loads(report("--format", "json"))["rows"]) == 7


def test_a_lost_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(("bench", "report", str(tmp_path / "none.jsonl")))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "cannot be read" in err
