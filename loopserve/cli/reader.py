"""Read a person's messages: with line editing and multi-line paste at a terminal, plain lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

PROMPT = "> "
_BLOCK = '"""'
_MIN_TOKENS = 256  # shorter messages show no progress


def at_terminal() -> bool:
    """Return whether input and output are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def reader() -> Callable[[], str]:
    """Return the function that returns the next message, or the next line of a pipe. It raises EOFError at the end.

    At a terminal Enter sends, Alt-Enter begins a new line, and a paste of several lines is one message. After an opening mark of a
    block, Enter begins a new line until the block is closed.
    """
    if not at_terminal():
        return lambda: input()
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        text = event.current_buffer.text.strip()
        if text.startswith(_BLOCK) and not text.removeprefix(_BLOCK).endswith(_BLOCK):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        PROMPT, multiline=True, key_bindings=keys, prompt_continuation="  ", enable_open_in_editor=False
    )
    return session.prompt


class ReadingProgress:
    """Show on one line how much of a long message has been read."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        if total < _MIN_TOKENS:
            return
        line = f"reading: {done:,} of {total:,} tokens"
        self._out.write(f"\r{line.ljust(self._width)}")
        self._out.flush()
        self._width = len(line)

    def clear(self) -> None:
        """Remove the line."""
        if self._width:
            self._out.write(f"\r{' ' * self._width}\r")
            self._out.flush()
            self._width = 0
