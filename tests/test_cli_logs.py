"""The log of conversations: written as they go, listed, searched, removed, gone on with; never mixed up and never lost."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loopserve.api import Engine
from loopserve.cli.chat_log import ChatLog, LoggedConversation, LoggedTurn, Recorder, TurnState, default_path
from loopserve.cli.repl import Repl
from loopserve.core.errors import ConfigError, InputError
from tests.test_cli_repl import Conversation
from tests.test_cli_run import Cli, cli  # noqa: F401  # a fixture

TOLD = "the code of lisbon is amber falcon river . what is the code of lisbon ?"
ANSWER = "lisbon is amber falcon river ."
CHAT = ("chat", "demo", "--stack", "dense")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "loopserve"


@pytest.fixture
def log(tmp_path: Path) -> ChatLog:
    return ChatLog(tmp_path / "logs.db")


def recorder(log: ChatLog, warnings: list[str] | None = None, **options: Any) -> Recorder:
    warned: list[str] = [] if warnings is None else warnings
    return Recorder(log, LoggedConversation("demo", "dense", **options), warned.append)


def states(log: ChatLog, number: int = 1) -> list[tuple[str, str, str]]:
    return [(turn.message, str(turn.state), turn.answer) for turn in log.conversation(number).turns]


# What is written, and when.


def test_the_log_is_in_the_users_data_folder(folder: Path) -> None:
    assert default_path() == folder / "logs.db"


def test_a_message_is_there_before_its_answer(log: ChatLog) -> None:
    notes = recorder(log, system="be kind")
    notes.asked("one")
    assert states(log) == [("one", "open", "")] and log.last().unanswered == "one"
    notes.answered("two", stats={"ttft_ms": 1.5}, token_ids=[3, 4], reasoning="hm")
    found = log.last()
    assert found.turns[0].stats == {"ttft_ms": 1.5} and found.turns[0].at and found.unanswered is None
    assert [message["content"] for message in found.messages] == ["be kind", "one", "two"]
    assert found.messages[-1] == {"role": "assistant", "content": "two", "token_ids": [3, 4], "reasoning_content": "hm"}


def test_nothing_is_created_for_a_chat_without_a_message(log: ChatLog) -> None:
    recorder(log)
    assert not log.path.exists() and log.conversations() == []
    with pytest.raises(InputError, match="there is no conversation to go on with"):
        log.last()


def test_what_people_write_is_theirs_alone_to_read(folder: Path) -> None:
    recorder(ChatLog()).asked("one")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())


def talk(log: ChatLog, *lines: Any) -> tuple[str, Repl]:
    printed: list[str] = []
    waiting: Iterator[Any] = iter(lines)

    def read() -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    repl = Repl(Conversation(), "", read, printed.append, recorder=recorder(log, printed))
    repl.run()
    return "".join(printed), repl


def test_stops_failures_retries_and_undone_turns_are_kept_apart(log: ChatLog) -> None:
    talk(log, "one", "interrupt", "fail", "/retry", "two", "/retry", "/undo", KeyboardInterrupt, KeyboardInterrupt)
    assert states(log) == [
        ("one", "answered", "you said one"),
        ("interrupt", "stopped", "you said "),
        ("fail", "failed", "InputError: too long: shorten it"),
        ("fail", "failed", "InputError: too long: shorten it"),
        ("two", "replaced", "you said two"),
        ("two", "undone", "again two"),
    ]
    assert [message["content"] for message in log.last().messages] == ["one", "you said one"]


def test_a_retry_that_is_stopped_leaves_the_old_answer(log: ChatLog) -> None:
    talk(log, "interrupt the second", "/retry")
    assert states(log) == [
        ("interrupt the second", "answered", "you said interrupt the second"),
        ("interrupt the second", "undone", "again "),
    ]
    assert log.last().unanswered is None


# What goes wrong with the file.


def test_a_log_that_cannot_be_written_is_a_warning_and_is_caught_up_with(
    log: ChatLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    notes = recorder(log, warnings)
    write = ChatLog.write

    def full(*arguments: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(ChatLog, "write", full)
    for text in ("one", "two"):
        notes.asked(text)
        notes.answered(text.upper())
    assert len(warnings) == 1 and "cannot be logged (database or disk is full); /save FILE keeps it" in warnings[0]
    assert notes.farewell() is None
    monkeypatch.setattr(ChatLog, "write", write)
    notes.asked("three")
    assert [message for message, _, _ in states(log)] == ["one", "two", "three"]
    assert notes.farewell() == "logged as conversation 1; go on with: loopserve chat --continue (or --id 1)"


def test_leaving_without_a_log_asks_once_more(log: ChatLog) -> None:
    log.path.mkdir()
    printed, _ = talk(log, "one", "/exit", "/exit", "never")
    assert "error: the conversation is in no file: the log cannot be written" in printed
    assert "/save FILE keeps it; leaving again drops it" in printed and "never" not in printed
    printed, _ = talk(log, "one", "/save somewhere", "/exit", "never")
    assert "in no file" not in printed and "never" not in printed
    assert "in no file" not in talk(log, "/exit")[0], "there is nothing to lose"


def test_a_file_that_is_no_log_is_named(folder: Path, cli: Cli) -> None:  # noqa: F811
    folder.mkdir(parents=True)
    (folder / "logs.db").write_text("no database at all" * 100)
    code, _, err = cli("logs")
    assert code == 2 and "cannot read the log of conversations" in err and str(folder) in err
    code, out, err = cli(*CHAT, stdin="hello\n")
    assert code == 0 and out and "cannot be logged" in err
    (folder / "logs.db").unlink()
    recorder(ChatLog()).asked("one")
    with sqlite3.connect(folder / "logs.db") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(ConfigError, match="written by a newer loopserve"):
        ChatLog().conversations()


def test_two_processes_that_go_on_with_one_conversation_do_not_mix(log: ChatLog) -> None:
    first = recorder(log)
    first.asked("one")
    first.answered("ONE")
    second = Recorder(log, log.last(), print)
    second.asked("two of the second")
    first.asked("two of the first")
    second.answered("2")
    first.answered("1")
    assert states(log, 1) == [("one", "answered", "ONE"), ("two of the second", "answered", "2")]
    assert states(log, 2) == [("one", "answered", "ONE"), ("two of the first", "answered", "1")]
    assert "conversation 2" in str(first.farewell())


WRITER = """
import sys, threading
from loopserve.cli.chat_log import ChatLog, LoggedConversation
from loopserve.cli.chat_log import Recorder
log = ChatLog()
notes = Recorder(log, LoggedConversation("demo", "dense"), lambda text: sys.exit(text))
for n in range(int(sys.argv[1])):
    notes.asked(f"{sys.argv[2]} {n}")
    notes.answered(f"{n} answered")
    print(n, flush=True)
"""


def test_many_processes_write_at_once(folder: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", WRITER, "8", f"talk {n}"]) for n in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    found = ChatLog().conversations()
    assert sorted(each.turns[0].message for each in found) == [f"talk {n} 0" for n in range(4)]
    assert all(
        len(each.messages) == 16 and len({m["content"].split()[1] for m in each.messages[::2]}) == 1 for each in found
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_process_loses_nothing_that_was_answered(folder: Path) -> None:
    draw = random.Random(0)
    for number in range(1, 6):
        child = subprocess.Popen([sys.executable, "-c", WRITER, "1000", "talk"], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(draw.randint(1, 20)):
            seen = int(child.stdout.readline())
        child.kill()
        child.wait()
        rest = [int(line) for line in child.stdout.read().splitlines() if line.strip()]
        child.stdout.close()
        answered = [turn for turn in ChatLog().conversation(number).turns if turn.state is TurnState.ANSWERED]
        assert len(answered) > (rest or [seen])[-1]
        assert [turn.message for turn in answered] == [f"talk {n}" for n in range(len(answered))]


# At the command line.


def test_a_conversation_goes_on_where_it_was(cli: Cli) -> None:  # noqa: F811
    assert cli(*CHAT, stdin=f"{TOLD}\n")[1].strip() == ANSWER
    code, out, err = cli("chat", "-c", stdin="/stack\nwhat is the code of lisbon ?\n/undo\n/undo\n/undo\n")
    assert out.startswith("version: 1\nname: dense\n") and ANSWER in out
    assert f"took back: {TOLD}" in out and (code, err) == (1, "error: nothing to undo: the conversation has no turn\n")
    cli(*CHAT, stdin="hello\n")
    assert f"took back: {TOLD}" not in cli("chat", "--continue", stdin="/undo\n")[1]
    code, out, _ = cli("chat", "--id", "1", "--stack", "snapkv", stdin=f"{TOLD}\n/stack\n")
    assert code == 0 and ANSWER in out and "name: snapkv\n" in out
    assert [turn.message for turn in ChatLog().conversation(1).turns if turn.state is TurnState.ANSWERED] == [TOLD]


def test_a_conversation_keeps_its_system_message(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    notes = recorder(ChatLog(), system="be kind")
    notes.asked("one")
    notes.answered("ONE")
    asked: list[Any] = []
    real = Engine.session

    def session(self: Engine, system: str | None = None, *, messages: Any = None) -> Any:
        asked.append((system, messages))
        return real(self)

    monkeypatch.setattr(Engine, "session", session)
    assert cli("chat", "-c", stdin="hello\n")[0] == 0
    assert asked == [(None, ChatLog().conversation(1).messages[:3])]
    assert [message["role"] for message in asked[0][1]] == ["system", "user", "assistant"]


def test_a_saved_conversation_that_goes_on_is_logged_whole(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "talk.json"
    cli(*CHAT, "--no-log", stdin=f"{TOLD}\n/save {file}\n")
    assert ChatLog().conversations() == []
    cli(*CHAT, "--load", str(file), stdin="what is the code of lisbon ?\n")
    assert [turn.message for turn in ChatLog().last().turns] == [TOLD, "what is the code of lisbon ?"]


@pytest.mark.parametrize("off", ["0", "false", "no", "off"])
def test_the_log_is_off_by_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch, off: str, folder: Path) -> None:  # noqa: F811
    monkeypatch.setenv("LOOPSERVE_LOG", off)
    assert cli(*CHAT, stdin="hello\n")[0] == 0 and not folder.exists()
    assert cli(*CHAT, "--log", stdin="hello\n")[0] == 0 and folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("chat",), "no model"),
        (("chat", "-c"), "there is no conversation to go on with"),
        (("chat", "--id", "7"), "no conversation 7"),
        (("chat", "demo", "-c", "--load", "x.json"), "name different conversations"),
        (("chat", "demo", "-c", "--system", "be kind"), "keeps its own system message"),
        (("logs", "show", "7"), "no conversation 7"),
        (("logs", "rm", "7"), "no conversation 7"),
    ],
)
def test_what_is_not_there_is_said(cli: Cli, arguments: tuple[str, ...], says: str, folder: Path) -> None:  # noqa: F811
    code, out, err = cli(*arguments)
    assert code == 2 and says in " ".join(err.replace("│", " ").split()) and out == "" and not folder.exists()


def test_conversations_are_listed_shown_searched_and_removed(cli: Cli) -> None:  # noqa: F811
    assert "no conversations in" in cli("logs")[1] and cli("logs", "--json")[1] == "[]\n"
    for text in ("Ärger mit [bold] Klammern", "100%_sure", "a\nb"):
        notes = recorder(ChatLog())
        notes.asked(text)
        notes.answered(f"answer to {text}")
    listed = cli("logs", "list")[1]
    assert listed == cli("logs")[1] and "Ärger mit [bold] Klammern" in listed and "a b" in listed
    assert [each["id"] for each in json.loads(cli("logs", "--json", "-n", "2")[1])] == [3, 2]
    assert [each["id"] for each in json.loads(cli("logs", "search", "ärger", "--json")[1])] == [1]
    assert [each["id"] for each in json.loads(cli("logs", "search", "%_", "--json")[1])] == [2]
    shown = cli("logs", "show", "3")[1]
    assert shown.startswith("conversation 3: demo under the stack dense, ") and "\n> a\n  b\nanswer to a\nb\n" in shown
    whole = json.loads(cli("logs", "show", "3", "--json")[1])
    assert whole["turns"][0]["state"] == "answered" and whole["messages"][1]["content"] == "answer to a\nb"
    assert cli("logs", "path")[1].strip() == str(default_path())
    assert cli("logs", "rm", "1", "9")[0] == 2 and len(ChatLog().conversations()) == 3
    assert cli("logs", "rm", "1", "3")[1] == "deleted 2 conversations\n"
    assert [each.id for each in ChatLog().conversations()] == [2]
    left = b"".join(path.read_bytes() for path in default_path().parent.iterdir())
    assert b"Klammern" not in left and b"sure" in left
    recorder(ChatLog()).asked("new")
    assert ChatLog().last().id == 4, "numbers are not used again"
    code, out, err = cli("logs", "show", "77", "--json")
    assert code == 2 and "no conversation 77" in json.loads(out)["error"] and "no conversation 77" in err


def test_a_long_list_shows_the_latest(log: ChatLog) -> None:
    for n in range(30):
        recorder(log).asked(f"talk {n}")
    assert [each.turns[0].message for each in log.conversations(limit=2)] == ["talk 29", "talk 28"]
    assert os.path.getsize(log.path) > 0
    assert LoggedTurn("x").state is TurnState.OPEN
