"""Run the chat loop: lines in, answers out. Depends on a conversation and a terminal, not on a model.

Ctrl-C during an answer stops it, and the conversation stays at its last complete turn. A second Ctrl-C in a row exits with 130. The
end of input exits with 0, or with 1 if a line of a pipe failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

from loopserve.cli.chat_log import Recorder
from loopserve.cli.output import turn_line, unexpected
from loopserve.cli.settings import describe_sampling, other_sampling, set_sampling
from loopserve.core.errors import InputError, LoopServeError, did_you_mean

LEFT_BY_INTERRUPT = 130
BLOCK = '"""'

_HELP = {
    "/help": "these commands",
    "/file PATH": "send a text file as the message",
    "/set": "the sampling options; /set max_new_tokens 60 changes one, /set temperature default resets it",
    "/stats": "figures of every turn so far",
    "/stack": "the policies at work",
    "/undo": "take back the last turn",
    "/retry": "answer again: the message that got no answer, else the last one",
    "/save FILE": "write the conversation as JSON",
    "/exit": "leave (so does the end of input)",
    BLOCK: f"begins and ends a message of several lines; {BLOCK}/text{BLOCK} sends a message that begins with /",
}
_COMMANDS = [name.split()[0] for name in _HELP if name.startswith("/")]
PROMPT = "> "
_MIN_TOKENS = 256  # shorter messages show no progress


class Turn(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


class Reply(Protocol):
    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def reasoning(self) -> str | None: ...


class Conversation(Protocol):
    """Define the part of ``loopserve.ChatSession`` that the loop uses."""

    @property
    def last_reply(self) -> Reply | None: ...

    @property
    def turns(self) -> Sequence[Turn]: ...

    def stream(self, text: str, **sampling: Any) -> Iterator[str]: ...

    def stream_retry(self, **sampling: Any) -> Iterator[str]: ...

    def undo(self) -> Mapping[str, str]: ...

    def save(self, path: str | Path) -> None: ...


class _Leave(Exception):
    """Signal that /exit was typed."""


def _nothing() -> None:
    """Do nothing."""


@dataclass
class Repl:
    """Read lines and print answers until the person leaves.

    read: returns the next line, like ``input``. more: returns the next line of a block. write: prints a piece without a line end.
    interactive: a person uses the terminal; otherwise lines come from a pipe, and one that fails makes the exit code 1. warn:
    prints an error. recorder: records the conversation. progress: called with the tokens read and those of the whole message.
    answering: called when the first piece of an answer arrives, or when none will.
    """

    conversation: Conversation
    stack: str
    read: Callable[[], str]
    write: Callable[[str], None]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False
    interactive: bool = True
    more: Callable[[], str] | None = None
    warn: Callable[[str], None] | None = None
    recorder: Recorder | None = None
    progress: Callable[[int, int], None] | None = None
    answering: Callable[[], None] = _nothing

    def __post_init__(self) -> None:
        self._unanswered = self.recorder.unanswered if self.recorder else None  # a message that /retry sends
        self._busy = False  # an answer is being computed or written
        self._failed = False
        self._unsaved = False
        self._said_so = False  # the warning that unlogged turns would be lost was shown

    def run(self) -> int:
        """Run until the person leaves. Return the exit code."""
        interrupts = 0  # in a row; each entered line resets the count
        while True:
            try:
                line = self.read().strip()
                interrupts = 0
                self._take(line)
            except (EOFError, _Leave):
                if self._may_leave():
                    return int(self._failed and not self.interactive)
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts >= 2 and self._may_leave():
                    self.write("\n")
                    return LEFT_BY_INTERRUPT
                self._say_stopped()
            except LoopServeError as error:
                self._error(str(error))
            except Exception as error:  # out of memory, a broken plugin: the turn was rolled back, the chat continues
                self._error(f"{unexpected(error)}; the conversation stands at its last complete turn, /save keeps it")

    def _take(self, line: str) -> None:
        if line.startswith(BLOCK):
            self._ask(self._block(line))
        elif line.startswith("/") and "\n" not in line:
            self._command(*line.split(maxsplit=1))
        elif line:
            self._ask(line)

    def _block(self, line: str) -> str:
        """Return the message that a line begins. Read more lines until one ends with the mark."""
        text = line.removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            try:
                text += "\n" + (self.more or self.read)()
            except EOFError:  # the lines so far are the message
                return text.strip("\n")
        return text.rstrip().removesuffix(BLOCK).strip("\n")

    def _ask(self, message: str) -> None:
        printed: list[str] = []
        self._unanswered = message
        if self.recorder:
            self.recorder.asked(message)
        try:
            self._print(self.conversation.stream(message, **self._options(self.sampling)), printed)
        except KeyboardInterrupt:
            if self.recorder:
                self.recorder.stopped("".join(printed))
            raise
        except Exception as error:
            if self.recorder:
                self.recorder.failed(unexpected(error))
            raise
        self._unanswered = None
        if self.recorder:
            self.recorder.answered("".join(printed).strip(), **self._details())
        self._answered()

    def _ask_again(self) -> None:
        """Print another answer to the last message. The old answer stays if that is interrupted."""
        printed: list[str] = []
        sampling, changed = other_sampling(self.sampling)
        note = f"({changed} for this answer: else it would be the same)\n" if changed else ""
        try:
            self._print(self.conversation.stream_retry(**self._options(sampling)), printed, note)
        except BaseException:
            if self.recorder:
                self.recorder.stopped_again("".join(printed))
            raise
        if self.recorder:
            self.recorder.answered_again("".join(printed).strip(), **self._details())
        self._answered()

    def _print(self, pieces: Iterator[str], printed: list[str], note: str = "") -> None:
        """Print an answer as it arrives. An interrupted one is closed at once, which rolls the unfinished turn back."""
        self._busy = True
        try:
            with closing(cast(Any, pieces)):
                for piece in pieces:
                    if not printed:
                        self.answering()
                        self.write(note)
                    printed.append(piece)
                    self.write(piece)
        finally:
            if not printed:
                self.answering()
        self._busy = False

    def _command(self, name: str, argument: str = "") -> None:
        match name:
            case "/help":
                for usage, meaning in _HELP.items():
                    self._say(f"{usage:<12}{meaning}")
            case "/stats":
                for turn in self.conversation.turns:
                    self._say(turn_line(turn.as_dict()))
                if not self.conversation.turns:
                    self._say("no turn yet")
            case "/stack":
                self._say(self.stack.rstrip())
            case "/set" if argument:
                self.sampling = set_sampling(self.sampling, *argument.split(maxsplit=1))
                self._say(describe_sampling(self.sampling, argument.split()[0]))
            case "/set":
                self._say(describe_sampling(self.sampling))
            case "/undo":
                self._say(f"took back: {self.conversation.undo()['content']}")
                self._unsaved = True
                if self.recorder:
                    self.recorder.undone()
            case "/retry" if self._unanswered is not None:
                self._ask(self._unanswered)
            case "/retry":
                self._ask_again()
            case "/file" if argument:
                self._ask(_text_of(argument))
            case "/file":
                self._say("say which: /file PATH")
            case "/save" if argument:
                self.conversation.save(Path(argument.strip()).expanduser())
                self._unsaved = False
                self._say(f"saved to {argument.strip()}")
            case "/save":
                self._say("say where: /save FILE")
            case "/exit":
                raise _Leave
            case _:
                hint = did_you_mean(name, _COMMANDS)
                raise InputError(f"no command {name!r}{hint}; {BLOCK}{name}{BLOCK} sends it as a message")

    def _options(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        return {**sampling, **({} if self.progress is None else {"progress": self.progress})}

    def _details(self) -> dict[str, Any]:
        """Return further fields of an answer for the log."""
        details: dict[str, Any] = {"stats": self.conversation.turns[-1].as_dict()} if self.conversation.turns else {}
        if reply := self.conversation.last_reply:
            details |= {"token_ids": list(reply.token_ids), "reasoning": reply.reasoning or ""}
        return details

    def _answered(self) -> None:
        self._unsaved = True
        self._say("")
        if self.verbose:
            self._say(turn_line(self.conversation.turns[-1].as_dict()))

    def _say_stopped(self) -> None:
        stopped = "stopped; the conversation stands at its last complete turn. " if self._busy else ""
        self._busy = False
        self._say(f"\n{stopped}Ctrl-C again leaves")

    def _may_leave(self) -> bool:
        """Return False, once and with a warning, if leaving would lose turns that the log should contain."""
        problem = self.recorder.problem if self.recorder else None
        if not self.interactive or self._said_so or problem is None or not self._unsaved:
            return True
        self._said_so = True
        self._error(f"the conversation is in no file: the log cannot be written ({problem})")
        self._say("/save FILE keeps it; leaving again drops it")
        return False

    def _error(self, reasons: str) -> None:
        self._failed, self._busy = True, False
        for reason in reasons.splitlines():
            (self.warn or self.write)(f"error: {reason}\n")

    def _say(self, text: str) -> None:
        self.write(f"{text}\n")


def _text_of(argument: str) -> str:
    """Return the text of a file. Raises InputError if it does not exist."""
    path = Path(argument.strip()).expanduser()
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no file; give the path of a text file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8 text (byte {error.start}); convert it first") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


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
        if text.startswith(BLOCK) and not text.removeprefix(BLOCK).endswith(BLOCK):
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
