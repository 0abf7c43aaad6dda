"""The comparison with other engines: rounds, answers held against dense attention's, rows, and tables without unearned speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import driver
from benchmarks.peers.driver import Peer, Plan, compared, identity, run
from benchmarks.peers.prompts import RANDOM, Case, messages
from loopserve.bench.peers import TIE, peers_markdown, servers_markdown
from loopserve.bench.report import renew
from loopserve.bench.rows import read_rows

SCRIPT = str(Path(__file__).with_name("fake_peer.py"))
TEXTS = [[[1, 2, 3], [4, 5]], [[6, 7, 8], [9, 10]]]


def plan(folder: Path, variants: Sequence[str], **more: Any) -> Plan:
    settings: dict[str, Any] = {
        "threads": [1],
        "rounds": 2,
        "new": 2,
        "outputs": 4,
        "cases": [Case("tiny", 3, 2)],
    } | more
    return Plan(
        peers={each: Peer("own", SCRIPT, each) for each in variants},
        reference=Peer("own", SCRIPT, "reference"),
        environments=folder,
        output=folder / "rows.jsonl",
        **settings,
    )


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "folders", lambda model, cache: (cache / model, None))
    monkeypatch.setattr(driver, "messages", lambda case, new, folder: TEXTS[: case.conversations])


def test_peers_take_turns_and_each_answer_is_held_against_dense(tmp_path: Path) -> None:
    said: list[str] = []
    run(plan(tmp_path, ["right", "rounds", "differs"]), said.append)
    assert [each.split(": ")[-1] for each in said[1:]] == ["right", "rounds", "differs", "rounds", "differs", "right"]
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row["op"] == "peer"]
    found = {row["peer"]: row for row in rows}
    for turn in ("first", "later"):
        assert found["right"][turn].items() >= {"same_tokens": 4, "gap": 0.0, "agrees": True}.items()
        assert found["rounds"][turn].items() >= {"same_tokens": 2, "gap": 0.05, "agrees": True}.items()
        assert found["differs"][turn].items() >= {"same_tokens": 2, "gap": None, "agrees": False}.items()
        assert found["right"][turn].keys() >= {"ttft_s", "ttft_cpu_s", "token_s", "token_cpu_s"}
    assert found["right"]["peak_mib"] > 1 and found["right"]["versions"] == {"pytest": pytest.__version__}
    assert str(tmp_path) not in json.dumps(rows), "rows name no paths"


def test_every_peer_gets_the_same_tokens_whatever_it_answered(tmp_path: Path) -> None:
    run(plan(tmp_path, ["right", "differs"], rounds=1), lambda text: None)
    asked = {
        each: (tmp_path / "models" / f"asked-{each}").read_text().splitlines()[-1] for each in ("right", "differs")
    }
    assert asked["right"] == asked["differs"] == str([[1, 2, 3, 6, 7, 8, 9, 4, 5], [6, 7, 8, 21, 22, 23, 24, 9, 10]])


def test_a_run_that_was_broken_off_goes_on_where_it_was(tmp_path: Path) -> None:
    run(plan(tmp_path, ["right"]), lambda text: None)
    said: list[str] = []
    run(plan(tmp_path, ["right", "rounds"]), said.append)
    assert [each.split(": ")[-1] for each in said] == ["rounds", "rounds"], "neither dense's answers nor a round again"
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row["op"] == "peer"]
    assert len(rows) == len({identity(row) for row in rows}) == 4


@pytest.mark.parametrize(
    ("variant", "error"),
    [
        ("dies", "the process has ended (3)"),
        ("raises", "MemoryError: no room in ... for it"),
        ("no model", "ValueError: the model has no weights"),
        ("short", "RuntimeError: answers have"),
    ],
)
def test_a_peer_that_fails_gets_a_row_that_says_so_and_the_others_go_on(
    tmp_path: Path, variant: str, error: str
) -> None:
    run(plan(tmp_path, [variant, "right"], rounds=1), lambda text: None)
    failed, right = (row for row in read_rows(tmp_path / "rows.jsonl") if row["op"] == "peer")
    assert failed["error"].startswith(error) and "first" not in failed
    assert right["first"]["agrees"]
    assert f"| {variant} | 1 | failed: {error}" in peers_markdown([failed, right])


def test_a_peer_that_fails_in_the_later_turn_keeps_the_first(tmp_path: Path) -> None:
    run(plan(tmp_path, ["second"]), lambda text: None)
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row["op"] == "peer"]
    assert all(row["first"]["agrees"] and row["later"] == {"error": "ValueError: no second\nturn"} for row in rows)
    assert "| failed: ValueError: no second turn | - |" in peers_markdown(rows)


def test_no_speed_is_shown_for_what_answers_differently(tmp_path: Path) -> None:
    run(plan(tmp_path, ["right", "rounds", "differs"]), lambda text: None)
    text = peers_markdown(read_rows(tmp_path / "rows.jsonl"))
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert lines["right"].count("| same |") == 2 and lines["right"].count("(") == 3 and lines["right"].endswith("| 2 |")
    assert lines["rounds"].count("same but for rounding (gap 0.05)") == 2 and lines["rounds"].count("(") == 5
    assert "| differs after 2 of 4 | - | - | differs after 2 of 4 | - |" in lines["differs"]
    assert "tiny, 3 tokens, 2 conversations at once:" in text


def test_one_differing_round_takes_a_peers_speed(tmp_path: Path) -> None:
    run(plan(tmp_path, ["right"]), lambda text: None)
    rows = read_rows(tmp_path / "rows.jsonl")
    rows[-1]["first"] |= {"agrees": False, "same_tokens": 1, "gap": None}
    line = next(line for line in peers_markdown(rows).splitlines() if line.startswith("| right"))
    assert "differs after 1 of 4 | - | - | same |" in line and line.count("(") == 1, "the later turn keeps its own"


def test_a_difference_is_rounding_up_to_the_limit() -> None:
    dense = [[5, 6]], [[{"5": 0.0}, {"6": 0.0, "7": TIE, "8": TIE + 0.01}]]
    assert compared([[5, 7]], *dense) == {"same_tokens": 1, "gap": TIE, "agrees": True}
    assert compared([[5, 8]], *dense) == {"same_tokens": 1, "gap": TIE + 0.01, "agrees": False}
    assert compared([[5, 9]], *dense) == {"same_tokens": 1, "gap": None, "agrees": False}


def test_tables_show_the_newest_commit_and_stand_between_their_markers(tmp_path: Path) -> None:
    run(plan(tmp_path, ["right"]), lambda text: None)
    rows = read_rows(tmp_path / "rows.jsonl")
    old = [{**row, "peer": "old", "commit": "older"} for row in rows if row["op"] == "peer"]
    assert "| old |" not in peers_markdown([*old, *rows])
    page = "before <!-- peers: rows.jsonl -->stale<!-- end of peers --> after"
    assert (
        renew(page, tmp_path)
        == f"before <!-- peers: rows.jsonl -->\n{peers_markdown(rows)}\n<!-- end of peers --> after"
    )
    assert peers_markdown([]) == servers_markdown([]) == "No rows."


def test_servers_stand_in_a_table_with_their_errors() -> None:
    figures = {"completed": 32, "failed": 0, "output_throughput": 55.55, "cached_share": 0.5}
    figures |= {f"p{share}_{name}_ms": 100.0 * share for share in (50, 99) for name in ("ttft", "itl")}
    conditions = {
        "op": "serve",
        "threads": 2,
        "device": "a CPU",
        "commit": "c",
        "date": "2026-01-01",
        "versions": {"torch": "2"},
    }
    conditions |= {"load": {"conversations": 8, "turns": 4, "output_tokens": 64}}
    rows = [
        {**conditions, "server": "one", "round": 1, "figures": figures},
        {**conditions, "server": "two", "round": 1, "error": "it did not start"},
    ]
    text = servers_markdown(rows)
    assert "| one | 32 of 32 | 55.5 | 5,000 / 9,900 | 5,000 / 9,900 | 50% | 1 |" in text
    assert "| two | failed: it did not start |" in text and "8 conversations at once, 4 turns each" in text


def test_cases_are_named_and_random_conversations_are_reproducible(tmp_path: Path) -> None:
    assert Case.read("smollm2:2048x4") == Case("smollm2", 2048, 4) and Case.read("random:16").name == "random:16"
    case = Case(RANDOM, 16, 2)
    found = messages(case, 4, tmp_path)
    assert found == messages(case, 4, tmp_path) and found[0] != found[1]
    assert [[len(each) for each in both] for both in found] == [[16, 4], [16, 4]]
