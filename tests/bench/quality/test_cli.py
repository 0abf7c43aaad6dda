"""``loopserve bench run|report|compare|ls`` on a tiny random model with the shipped sample, and the errors of wrong commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loopserve.bench.quality.suite import load_suite
from loopserve.bench.suite_files import SuiteKind, suite_files
from loopserve.cli import main
from loopserve.core.errors import ConfigError
from tests.bench.quality.small import random_model

Cli = Callable[..., tuple[int, str, str]]
MINE = (
    "version: 1\nname: mine\ntasks:\n  - {task: recall, tokens: 300, turns: 2, dialogues: 2, position: [begin, end]}\n"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model, as a user has a real one."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    for part in random_model():
        part.save_pretrained(directory)
    return directory


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(ended.value.code or 0), out, err

    return run


def test_the_smoke_suite_runs_on_a_model_directory_and_is_shown(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = cli("run", "--suite", "quality-smoke", "--model", tiny, "--limit", 2, "--output-dir", run)
    assert code == 0, err
    for title in ("Answers", "Score by task", "Prefill", "Decoding", "Time (medians)", "Problems"):
        assert title in out
    assert "━" not in err, "a bar has no place where nobody looks"
    code, shown, err = cli("report", run, "--by", "words")
    assert code == 0 and (run / "report.html").read_text().startswith("<!DOCTYPE html>") and "report.html" in err
    assert "Score by words" in shown and out.split("Prefill")[1].split("Time")[0] in shown
    found = json.loads(cli("report", run, "--format", "json")[1])
    assert found["identity"]["model"]["name"] == str(tiny) and found["identity"]["metrics"].keys() >= {
        "rouge",
        "difflib",
    }
    assert {row["stack"] for row in found["rows"]["stack"]} == {"dense", "loopserve@0.2", "snapkv@0.2"}
    code, _, err = cli("report", run, "--by", "wrods")
    assert code == 2 and "--by wrods: no turn of this run has such a label; did you mean 'words'?" in err
    elsewhere = tmp_path / "a" / "page"
    text = cli("report", run, "--markdown", "--output-dir", elsewhere)[1]
    assert "| dense |" in text and (elsewhere / "report.md").read_text() == text
    code, out, _ = cli("compare", "dense", "snapkv@0.2", "--run", run, "--format", "json")
    assert code == 0 and json.loads(out)["differences"][0]["group"] == "all"
    assert "no difference" in cli("compare", run, run)[1]


@pytest.mark.parametrize(
    ("suite", "tasks"), [("longbench", ["longbench-hotpotqa", "longbench-trec"]), ("published", [])]
)
def test_the_commands_for_a_real_model_run_on_a_small_one(
    cli: Cli, tiny: Path, tmp_path: Path, suite: str, tasks: list[str]
) -> None:
    """docs/benchmark.md's commands, the shipped samples in the place of the data."""
    chosen = [part for task in tasks for part in ("--tasks", task)]
    command = ("run", "--suite", suite, "--model", tiny, "--source", "shipped", *chosen, "--limit", 1)
    code, out, err = cli(*command, "--output-dir", tmp_path / "run", "--format", "json")
    assert code == 0, err
    found = json.loads(out)
    assert {row["stack"] for row in found["rows"]["stack"]} == set(load_suite(suite).stacks)
    assert not found["errors"] and all(row["turns"] >= 3 for row in found["rows"]["stack"])
    assert ("published: configs:" in err) == (suite == "published")


def test_data_that_are_not_there_come_with_the_command_that_gets_them(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("run", "--suite", "longbench", "--source", tmp_path / "none", "--output-dir", tmp_path / "run")
    assert code == 2 and "hf download THUDM/LongBench" in err and not (tmp_path / "run").exists()
    code, _, err = cli("run", "--suite", "synthetic-small", "--source", "hub", "--output-dir", tmp_path / "run")
    assert code == 2 and "has no task that reads data" in err


def test_a_run_is_resumed_by_the_same_command_only(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    suite, run = tmp_path / "mine.yaml", tmp_path / "run"
    suite.write_text(MINE)
    command = ("run", "--suite", suite, "--model", tiny, "--stack", "snapkv", "--output-dir", run)
    first = json.loads(cli(*command, "--format", "json")[1])
    records = (run / "records.jsonl").read_bytes()
    code, _, err = cli(*command)
    assert code == 2 and "holds a run already: go on with --resume" in err
    (run / "records.jsonl").write_bytes(records[: len(records) // 2])
    code, out, _ = cli(*command, "--resume", "--format", "json")
    again = json.loads(out)
    assert code == 0 and len(again["sessions"]) == 2 and again["identity"] == first["identity"]
    assert [row["score"] for row in again["rows"]["stack"]] == [row["score"] for row in first["rows"]["stack"]]
    code, _, err = cli(*command, "--resume", "--stack", "streaming_llm", "--seed", 3)
    assert code == 2 and "settings.seed was 0 and is 3" in err and "stacks.streaming_llm was absent" in err


def test_suites_tasks_and_stacks_are_listed(cli: Cli) -> None:
    out = cli("ls")[1]
    for name in ("synthetic-small", "quality-smoke", "recall", "published", "longbench-hotpotqa", "snapkv", "cpu"):
        assert name in out
    found = json.loads(cli("ls", "--format", "json")[1])
    assert found.keys() == {"suites", "speed_suites", "tasks", "stacks"}
    assert found["tasks"]["recall"]["options"]["properties"]["tokens"]["description"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINE + "stack: [dense]\n", "mine.yaml:5: stack: unknown key; did you mean 'stacks'?"),
        (MINE.replace("turns: 2", "turn: 2"), "turn: unknown key; did you mean 'turns'?"),
        (MINE.replace("recall", "recal"), "unknown task 'recal'; did you mean 'recall'?"),
        (MINE + "stacks: [snapk]\n", "unknown stack 'snapk'; did you mean 'snapkv'?"),
        (MINE + "attended: [2.0]\n", "--attended 2: must be from 0 (a stack's own budget) to 1"),
        ("version: 1\nname: mine\ntasks: []\n", "mine.yaml:3: tasks: "),
        ("version: 1\nname: mine\n", "mine.yaml:1: tasks: this key is required"),
        ("version: 1\nname: mine\nshort: []\n", "this is a suite of speed"),
        ("version: 1\nname: [mine\n", "mine.yaml:3: broken YAML"),
        (MINE.replace("tasks:", "task:"), "unknown key; did you mean 'tasks'?"),
    ],
)
def test_a_mistake_in_a_suite_is_one_clear_line(cli: Cli, tmp_path: Path, text: str, said: str) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text(text)
    code, _, err = cli("run", "--suite", suite, "--output-dir", tmp_path / "run")
    assert code == 2 and said in err and err.startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_wrong_commands_are_answered_with_what_is_known(cli: Cli, tmp_path: Path) -> None:
    assert (
        "unknown suite 'sintetic-small'; did you mean 'synthetic-small'?" in cli("run", "--suite", "sintetic-small")[2]
    )
    assert "no quality run" in cli("report", tmp_path)[2]
    assert "no quality run" in cli("compare", tmp_path, tmp_path)[2]
    assert cli("report", tmp_path, tmp_path)[0] == 2
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    assert "damaged" in cli("report", tmp_path)[2]
    (tmp_path / "manifest.json").write_text('{"version": 1, "identity": [1], "sessions": [{}]}')
    assert "damaged" in cli("report", tmp_path)[2]
    assert "are for rows of speed" in cli("report", tmp_path, "--only", "ttft")[2]
    records = tmp_path / "records.jsonl"
    records.write_text('{"stack": "dense", "task": "recall", "sample": "0"}\n')
    assert "give the run's directory" in cli("report", records)[2]
    records.write_text('{"op": "x"}\n')
    assert "records.jsonl:1: not a result row: it has no 'device'" in cli("report", records)[2]
    records.write_text("")
    assert "no rows yet" in cli("report", records)[2]
    assert "are for quality runs" in cli("report", records, "--by", "set")[2]


@pytest.mark.parametrize("name", suite_files(SuiteKind.QUALITY))
def test_shipped_suites_load(name: str) -> None:
    assert load_suite(name).name == name
    with pytest.raises(ConfigError, match=f"unknown suite '{name}x'"):
        load_suite(name + "x")
