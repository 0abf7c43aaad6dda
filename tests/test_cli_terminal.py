"""``chat`` at a real (pseudo) terminal: prompt, line editing and Ctrl-C as a person has them."""

import os
import select
import signal
import sys
import time

import pytest

pty = pytest.importorskip("pty", reason="no pseudo terminals on this platform")

PROGRAM = """
import sys, time
from types import SimpleNamespace

class Chat:
    turns = []
    def __enter__(self): return self
    def __exit__(self, *raised): pass
    def stream(self, text, **sampling):
        yield text.upper()
        if text == "slow":
            time.sleep(60)

engine = SimpleNamespace(session=lambda system: Chat())
api = SimpleNamespace(Engine=SimpleNamespace(from_pretrained=lambda *arguments, **options: engine))
sys.modules["loopserve.api"] = api
from loopserve.cli import main
main(["chat", "demo", "--stack", "dense"])
"""


class Terminal:
    """A child process at the other end of a terminal."""

    def __init__(self) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-c", PROGRAM])

    def expect(self, text: str, seconds: float = 60.0) -> str:
        """Read until ``text`` was printed."""
        seen, until = "", time.monotonic() + seconds
        while text not in seen and time.monotonic() < until:
            if select.select([self.end], [], [], 0.1)[0]:
                seen += os.read(self.end, 4096).decode()
        assert text in seen, seen
        return seen

    def type(self, text: str) -> None:
        time.sleep(0.3)  # a person is slower than the moment between the prompt and its reading
        os.write(self.end, text.encode())

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_at_a_terminal():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TERM", "dumb")
        terminal = Terminal()
    try:
        greeting = terminal.expect("> ")
        assert "demo under the stack dense; /help lists the commands" in greeting
        terminal.type("hello\n")
        terminal.expect("HELLO\r\n> ")
        terminal.type("slow\n")
        terminal.expect("SLOW")
        terminal.type("\x03")
        terminal.expect("stopped; the conversation stands at its last complete turn. Ctrl-C again leaves\r\n> ")
        terminal.type("again\n")
        terminal.expect("AGAIN\r\n> ")
        terminal.type("\x03")
        terminal.expect("Ctrl-C again leaves\r\n> ")
        terminal.type("\x03")
        assert terminal.wait() == 130
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
    finally:
        os.close(terminal.end)
