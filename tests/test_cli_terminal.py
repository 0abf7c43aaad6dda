"""``chat`` at a real (pseudo) terminal: prompt, line editing, pastes and Ctrl-C as a person has them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pty", reason="no pseudo terminals on this platform")
from tests.terminal import CTRL_C, CTRL_D, ENTER, PASTE, Terminal

FAKE = """
import sys, time
from types import SimpleNamespace

class Chat:
    turns, last_reply = [], None
    def __enter__(self): return self
    def __exit__(self, *raised): pass
    def stream(self, text, **sampling):
        yield text.upper()
        if text == "slow":
            time.sleep(3600)

engine = SimpleNamespace(session=lambda system: Chat())
api = SimpleNamespace(Engine=SimpleNamespace(from_pretrained=lambda *arguments, **options: engine))
sys.modules["loopserve.api"] = api
from loopserve.cli import main
main(["chat", "demo", "--stack", "dense"])
"""

# The real program; while the file HOLD is there, no forward pass ends: the message is still being read.
PROGRAM = """
import os, sys, time
from loopserve.cli import main
from loopserve.core.engine.engine import TokenEngine

run = TokenEngine.run_pass
def held(self, *arguments, **options):
    while os.path.exists(os.environ["HOLD"]):
        time.sleep(3600)
    return run(self, *arguments, **options)
TokenEngine.run_pass = held
main(sys.argv[1:])
"""

FACTS = "the code of lisbon is amber falcon river . the code of oslo is silver lantern ."
LISBON, OSLO = "lisbon is amber falcon river .", "oslo is silver lantern ."
STOPPED = "stopped; the conversation stands at its last complete turn. Ctrl-C again leaves"


@pytest.mark.parametrize("terminal_type", ["xterm", "dumb"])
def test_a_conversation_at_a_terminal(terminal_type: str) -> None:
    with Terminal(FAKE, environment={"TERM": terminal_type}) as terminal:
        assert "demo under the stack dense; /help lists the commands" in terminal.prompt()
        terminal.enter("hello")
        terminal.expect("HELLO\r\n")
        terminal.prompt()
        terminal.enter("slow")
        terminal.expect("SLOW")
        terminal.type(CTRL_C)
        terminal.expect(f"{STOPPED}\r\n")
        terminal.prompt()
        terminal.enter("again")
        terminal.expect("AGAIN\r\n")
        terminal.prompt()
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-C again leaves\r\n")
        terminal.prompt()
        terminal.type(CTRL_C)
        assert terminal.wait() == 130


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"XDG_DATA_HOME": str(tmp_path / "data"), "HOLD": str(tmp_path / "hold")}


def logged(environment: dict[str, str], *arguments: str) -> str:
    program = "import sys; from loopserve.cli import main; main(sys.argv[1:])"
    values = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    command = [sys.executable, "-c", program, "logs", *arguments]
    return subprocess.run(command, env=values, capture_output=True, text=True, check=True).stdout


def _wait_until_logged(environment: dict[str, str], *, turns: int) -> None:
    """Wait until conversation 1 has so many turns. A message that was entered is in the log a moment later."""
    while len(json.loads(logged(environment, "show", "1", "--json"))["turns"]) < turns:
        pass


@pytest.mark.slow
def test_a_session_in_which_nothing_is_lost(environment: dict[str, str], tmp_path: Path) -> None:
    """All that a person meets: pastes, blocks, files, options, stops, retries, undo, save, and going on another day."""
    hold, saved, text = Path(environment["HOLD"]), tmp_path / "talk.json", tmp_path / "text.txt"
    text.write_text("what is the code\nof oslo ?\n")
    with Terminal(PROGRAM, ["chat", "demo", "--stack", "dense"], environment) as terminal:
        assert "the bundled model knows only what you give it; try: the code of lisbon is" in terminal.prompt()

        # Several lines are one message: pasted, as a block, from a file.
        terminal.type(PASTE.format(f"{FACTS}\nwhat is the code\nof lisbon ?"))
        terminal.type(ENTER)
        terminal.expect(f"{LISBON}\r\n")
        terminal.prompt()
        terminal.enter('"""what is the code')
        terminal.enter('of oslo ?"""')
        terminal.expect(f"{OSLO}\r\n")
        terminal.prompt()
        terminal.enter(f"/file {text}")
        terminal.expect(f"{OSLO}\r\n")
        terminal.prompt()
        terminal.enter("/stats")
        terminal.expect("turn 3: ")
        assert "turn 4" not in terminal.prompt()

        # Options.
        terminal.enter("/set max_new_tokens 3")
        terminal.expect("max_new_tokens = 3")
        terminal.prompt()
        terminal.enter("what is the code of lisbon ?")
        terminal.expect("\r\nlisbon is amber\r\n")
        terminal.prompt()
        terminal.enter("/set max_new_tokens default")
        terminal.expect("max_new_tokens = 256")
        terminal.prompt()

        # Another answer; greedy decoding would give the same.
        terminal.enter("/retry")
        terminal.expect("(temperature 0.7 for this answer: else it would be the same)\r\n")
        terminal.prompt()
        terminal.enter("/undo")
        terminal.expect("took back: what is the code of lisbon ?")
        terminal.prompt()

        # A long message is stopped while it is read; /retry sends it again.
        hold.touch()
        terminal.type(PASTE.format("we had soup for lunch today .\n" * 60 + "what is the code of oslo ?"))
        terminal.type(ENTER)
        terminal.expect("reading: 0 of ")
        terminal.type(CTRL_C)
        terminal.expect(f"{STOPPED}\r\n")
        terminal.prompt()
        hold.unlink()
        terminal.enter("/retry")
        terminal.expect("reading: 0 of ")
        terminal.expect(f"{OSLO}\r\n")
        terminal.prompt()

        terminal.enter(f"/save {saved}")
        terminal.expect(f"saved to {saved}")
        terminal.prompt()
        terminal.enter(f"/save {tmp_path}/no/such/folder.json")
        terminal.expect("error: ")
        terminal.prompt()

        # Left by Ctrl-C in mid-answer and once more: nothing is dropped.
        hold.touch()
        terminal.enter("what is the code of lisbon ?")
        _wait_until_logged(environment, turns=5)
        terminal.type(CTRL_C)
        terminal.expect("Ctrl-C again leaves\r\n")
        terminal.prompt()
        terminal.type(CTRL_C)
        assert terminal.wait() == 130
        assert "logged as conversation 1; go on with: loopserve chat --continue (or --id 1)" in terminal.printed
        hold.unlink()

    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages[1::2]] == [LISBON, OSLO, OSLO, OSLO]
    assert json.loads(logged(environment, "show", "1", "--json"))["messages"] == messages

    # Another day: the message that got no answer, and turns of the first day taken back. The process is killed.
    with Terminal(PROGRAM, ["chat", "-c"], environment) as terminal:
        greeting = terminal.prompt()
        assert "demo under the stack dense" in greeting and "going on after 4 turns" in greeting
        assert "the last message got no answer: /retry sends it again" in greeting
        terminal.enter("/retry")
        terminal.expect(f"{LISBON}\r\n")
        terminal.prompt()
        for taken in ("what is the code of lisbon ?", "of oslo ?"):
            terminal.enter("/undo")
            terminal.expect("took back: ")
            terminal.expect(taken)
            terminal.prompt()
        hold.touch()
        terminal.enter("the code of paris is")
        _wait_until_logged(environment, turns=4)
        terminal.kill()
        hold.unlink()
    shown = json.loads(logged(environment, "show", "1", "--json"))
    assert shown["messages"] == messages[:6]
    assert shown["turns"][-1]["state"] == "open" and shown["turns"][-1]["message"] == "the code of paris is"

    # The saved file, and the log left out; Ctrl-D leaves.
    with Terminal(
        PROGRAM, ["chat", "demo", "--stack", "dense", "--load", str(saved), "--no-log"], environment
    ) as terminal:
        assert "going on after 4 turns" in terminal.prompt()
        terminal.enter("/retry")
        terminal.expect("for this answer")
        terminal.prompt()
        terminal.type(CTRL_D)
        assert terminal.wait() == 0
        assert "logged" not in terminal.printed
    assert len(json.loads(logged(environment, "--json"))) == 1


def test_the_tests_do_not_depend_on_the_signals_they_were_started_with() -> None:
    """A child of a process that ignores Ctrl-C, as background jobs do, is stopped by Ctrl-C all the same."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Terminal(FAKE) as terminal:
            terminal.prompt()
            terminal.enter("slow")
            terminal.expect("SLOW")
            terminal.type(CTRL_C)
            terminal.expect(f"{STOPPED}\r\n")
    finally:
        signal.signal(signal.SIGINT, before)
