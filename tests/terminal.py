"""A child process at the other end of a pseudo-terminal, for tests. Waits for what it prints, never for a time."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"
PASTE = "\x1b[200~{}\x1b[201~"  # how a terminal sends pasted text
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>78]|\([A-B0])")
_PATIENCE_S = 120.0  # only a child that hangs takes so long


class Terminal:
    """Run a Python program with arguments at a terminal of 120 columns."""

    def __init__(
        self, program: str, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.printed = ""  # all of it so far, without escape sequences
        self._seen = 0
        self._bytes = b""
        values = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **(environment or {})}
        values.pop("COLUMNS", None)
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            # A test run in the background ignores Ctrl-C, and its children inherit that.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
            os.execve(sys.executable, [sys.executable, "-c", program, *arguments], values)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.end)

    def expect(self, text: str) -> str:
        """Read until ``text`` was printed after what was expected before; return what came up to it."""
        until = time.monotonic() + _PATIENCE_S
        while text not in self.printed[self._seen :]:
            assert time.monotonic() < until and self._read(), f"{text!r} is not in {self.printed[self._seen :]!r}"
        start = self._seen
        self._seen = self.printed.index(text, start) + len(text)
        return self.printed[start : self._seen]

    def prompt(self) -> str:
        """Read until the program waits for a line; return what came before.

        A program that edits lines itself switches the terminal's own editing off while it waits.
        """
        start = self._seen
        until = time.monotonic() + _PATIENCE_S
        while termios.tcgetattr(self.end)[3] & termios.ICANON:
            assert time.monotonic() < until, self.printed[self._seen :]
            self._read(0.05)
        while self._read(0.0):
            pass
        self._seen = len(self.printed)
        return self.printed[start:]

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def enter(self, text: str) -> None:
        self.type(text + ENTER)

    def wait(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def _read(self, seconds: float = _PATIENCE_S) -> bool:
        """Read what has come, waiting for some; False if nothing came or the other end is closed."""
        if not select.select([self.end], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self.end, 65536)
        except OSError:  # Linux reports the closed end so
            return False
        self._bytes += piece
        self.printed = _ESCAPES.sub("", self._bytes.decode(errors="ignore"))
        return bool(piece)
