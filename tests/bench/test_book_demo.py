"""The conversation about a novel: its turns, its figures, and its tables. The bundled model answers nothing right, but in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopserve.bench import book_demo
from loopserve.bench.book_demo import BookTurn, book_turns, is_right, run_book_demo
from loopserve.bench.demo_cells import BOOK_COLUMNS, book_cells
from loopserve.bench.figures import plot_demo
from loopserve.bench.report import book_table, renew
from loopserve.cli import demo as command

STACKS = ["dense", "loopserve", "streaming_llm"]


def test_every_question_asks_for_a_fact_that_was_stated_before() -> None:
    turns = book_turns()
    for number, turn in enumerate(turns, 1):
        assert 1 <= turn.stated_in <= number
        assert turn.expected in turns[turn.stated_in - 1].message
        assert turn.message.endswith(turn.question) and turn.expected not in turn.question
        assert all(turn.expected not in each.message for each in turns[turn.stated_in : number])
    assert any(number - turn.stated_in >= 2 for number, turn in enumerate(turns, 1))
    assert "Call me Ishmael" not in turns[0].message and "CHAPTER 7. The Chapel." in turns[0].message


@pytest.mark.parametrize(
    ("answer", "right"),
    [("It is 48213.", True), ("48213", True), ("148213", False), ("482130", False), ("4821", False), ("", False)],
)
def test_an_answer_is_right_if_it_contains_the_whole_number(answer: str, right: bool) -> None:
    assert is_right(answer, "48213") is right


def test_the_command_line_compares_the_same_stacks() -> None:
    assert (command.BOOK_STACKS, command.MODEL) == (book_demo.STACKS, book_demo.MODEL)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    words = "we had soup for lunch today . " * 40
    turns = [
        BookTurn(f"{words} the code of lisbon is amber . what is the code of lisbon ?", "q", "amber", 1),
        BookTurn(f"{words} what is the code of lisbon ?", "q", "amber", 1),
    ]
    seen: list[tuple[str, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book_demo, "book_turns", lambda: turns)
        patch.setattr(book_demo, "ATTENDED", 0.2)
        found = run_book_demo(stacks=STACKS[1:], model="demo", progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[1] == step[2]] == [(name, 2, 2) for name in STACKS]
    return found


def test_figures_hang_together(result: dict[str, Any]) -> None:
    assert list(result["stacks"]) == STACKS
    for name, row in result["stacks"].items():
        assert row["asked"] == 2 == len(row["turns"])
        for each in ("right", "same", "seconds"):
            assert row[each] == pytest.approx(sum(turn[each] for turn in row["turns"]))
        assert row["seconds"] * 1000 >= row["ttft_ms"] > 0
        assert (row["attended_fraction"] < 0.6) == (name != "dense")
        for turn, reference in zip(row["turns"], result["stacks"]["dense"]["turns"], strict=True):
            assert turn["same"] == (turn["answer"] == reference["answer"])
    assert result["stacks"]["dense"]["same"] == 2


def test_tables_show_the_figures(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(result), encoding="utf-8")
    for kind in ("demo, short", "demo"):
        shown = renew(f"<!-- {kind}: rows.json -->\n<!-- end of demo -->", tmp_path)
        assert all(f"| `{name}` |" in shown for name in STACKS)
        assert ("| stack | " + " | ".join(BOOK_COLUMNS) + " |" in shown) == (kind == "demo, short")
    assert " | ".join(book_cells(result["stacks"]["loopserve"])) in book_table(result)
    plot_demo(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
