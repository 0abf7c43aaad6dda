"""Tables at any width: every figure is there in full, and nothing is wider than the terminal."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopserve.bench.quality.tables import Table
from loopserve.cli import main, quality
from loopserve.cli.options import Format
from loopserve.cli.output import print_table
from tests.test_cli_run import ROW

WIDTHS = (40, 60, 80, 120)

COLUMNS = ("stack", *(f"figure {n}" for n in range(9)))
ROWS = [(name, *(f"{n + 1},{n}00.{n}" for n in range(9))) for name in ("dense", "loopserve-paper", "a")]


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def check(out: str, width: int, cells: Sequence[str]) -> None:
    """Every cell stands whole on one line."""
    lines = out.splitlines()
    assert "…" not in out and max(map(len, lines)) <= width, [line for line in lines if len(line) > width]
    for cell in cells:
        assert any(cell in line for line in lines), cell


def printed(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("rows", [ROWS, ROWS * 5, ROWS[:1], []], ids=["few", "many", "one", "none"])
@pytest.mark.parametrize("right", [False, True])
def test_figures_are_never_cut(
    width: int, rows: list[tuple[str, ...]], right: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(COLUMNS, rows, title="all turns", right=right)
    out = capsys.readouterr().out
    check(out, width, [cell for row in rows for cell in row])
    assert "all turns" in out


def test_text_is_wrapped_and_no_word_of_it_is_lost(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = "what a policy does, in 1,024 words of some length, with https://arxiv.org/abs/2507.13681"
    print_table(("name", "figure", "text"), [("dense", "12,345.6", text)] * 9, prose=("text",))
    out = capsys.readouterr().out
    check(out, width, ["dense", "12,345.6", "1,024"])
    assert re.sub(r"\s|dense|12,345\.6", "", out).count(re.sub(r"\s", "", text)) == 9


def test_a_cell_wider_than_the_terminal_is_folded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = "x" * 100
    print_table(("name", "figure"), [(long, "[1,024]"), ("b", long)])
    out = capsys.readouterr().out
    assert "…" not in out and "[1,024]" in out and out.count("x") == 200 and max(map(len, out.splitlines())) <= 40


@pytest.mark.parametrize(
    ("arguments", "cells"),
    [
        (["policies", "ls"], ["prefill", "sample_attention", "expected_attention", "2507.13681"]),
        (["policies", "matrix"], ["streaming_llm", "sample_attention", "refused", "works"]),
        (["policies", "show", "loopserve"], ["alpha", "0.95"]),
        (["stack", "ls"], ["loopserve-paper", "streaming_llm"]),
        (["bench", "ls"], ["quality-smoke", "synthetic-small"]),
        (["policies", "check", "dense", "--report"], []),
        (["logs"], []),
    ],
)
def test_lists_fit(width: int, arguments: list[str], cells: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(arguments, capsys)
    assert "…" not in out
    tables = [
        line
        for line in out.splitlines()
        if not line.startswith(("refused:", "stacks:", "suites of", "paper:", "no conv"))
    ]
    check("\n".join([*tables, ""]) or "\n", width if cells or arguments[1:] else 10_000, cells)


def test_the_demo_fits(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["dense", "loopserve", "loopserve-paper", "snapkv", "streaming_llm"]
    places = {"begin": {"right": 3, "asked": 4}, "middle": {"right": 4, "asked": 4}, "end": {"right": 11, "asked": 12}}
    rows = {name: ROW | {"turns": [ROW, ROW], "positions": places} for name in names}
    module = SimpleNamespace(run_demo=lambda **options: {"stacks": rows, "summary": "It went well."})
    monkeypatch.setitem(sys.modules, "loopserve.bench.demo", module)
    out = printed(["demo", "--model", "demo"], capsys)
    check(out, width, ["41.2 ms", "120.6 KiB", "5.0 MiB", "512.0 KiB", "1,234", "11/12", *names])


def test_a_quality_run_fits(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ("stack", "dialogues", "answers", "score", "exact match", "failed", "pairs read", "agreement")
    rows = tuple(
        (f"{name}@0.1", "1,200", "3,600", "87.5 ± 1.3", "81.2 ± 1.9", "0", "123,456.7", "2,7") for name in ("a", "bb")
    )
    monkeypatch.setattr("loopserve.bench.quality.tables.tables", lambda run, by: [Table("answers", columns, rows)])
    quality.show_run(SimpleNamespace(records=[]), (), Format.HUMAN)  # type: ignore[arg-type]
    check(capsys.readouterr().out, width, [cell for row in rows for cell in row])


def test_rows_of_speed_fit(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu.jsonl"
    ops = {json.loads(line)["op"] for line in results.read_text().splitlines()}
    out = printed(["bench", "report", str(results)], capsys)
    from loopserve.bench.report import table
    from loopserve.bench.rows import latest, read_rows

    figures = {cell for row in table(latest(read_rows(results))) for cell in row[4:9]}
    tables = "\n".join(line for line in out.splitlines() if "thread(s)" not in line and "break-even" not in line)
    check(tables, width, sorted(ops | figures))


def test_a_figure_per_line_fits(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row: dict[str, Any] = {"tokens per second, ours": 123456.789, "name": "a long name " * 3}
    run: Callable[..., Any] = lambda **options: {"rows": [row]}  # noqa: E731  # stands in for a module's function
    monkeypatch.setitem(sys.modules, "loopserve.bench.speed.engine", SimpleNamespace(run_engine_bench=run))
    check(printed(["bench", "engine"], capsys), width, ["1.235e+05"])
