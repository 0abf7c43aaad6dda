"""The chat loop: lines in, answers out. Knows a conversation and a terminal, no model.

Ctrl-C in mid-answer stops the answer, and the conversation stays at its last complete turn. A second Ctrl-C in a row
leaves with 130; the end of input leaves with 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from loopserve.cli.output import turn_line, unexpected
from loopserve.core.errors import LoopServeError, did_you_mean

LEFT_BY_INTERRUPT = 130

_HELP = {
    "/help": "these commands",
    "/stats": "figures of every turn so far",
    "/stack": "the policies at work",
    "/undo": "take back the last turn",
    "/retry": "take back the last answer and give another",
    "/save FILE": "write the conversation as JSON",
    "/exit": "leave (so does the end of input)",
}
_COMMANDS = [name.split()[0] for name in _HELP]


class Turn(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


class Answer(Protocol):
    @property
    def text(self) -> str: ...


class Conversation(Protocol):
    """What the loop needs of ``loopserve.ChatSession``."""

    @property
    def turns(self) -> Sequence[Turn]: ...

    def stream(self, text: str, **sampling: Any) -> Iterator[str]: ...

    def undo(self) -> Mapping[str, str]: ...

    def retry(self, **sampling: Any) -> Answer: ...

    def save(self, path: str | Path) -> None: ...


class _Leave(Exception):
    """/exit was typed."""


@dataclass
class Repl:
    """read: gives the next line, like ``input``. write: prints a piece without a line end."""

    conversation: Conversation
    stack: str
    read: Callable[[], str]
    write: Callable[[str], None]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False

    def run(self) -> int:
        """Until the person leaves; the exit code."""
        interrupts = 0  # in a row: a line that was entered begins a new count
        while True:
            answering = False
            try:
                line = self.read().strip()
                interrupts, answering = 0, True
                self._take(line)
            except EOFError:
                return 0
            except _Leave:
                return 0
            except KeyboardInterrupt:
                interrupts += 1
                if interrupts == 2:
                    self.write("\n")
                    return LEFT_BY_INTERRUPT
                stopped = "stopped; the conversation stands at its last complete turn. " if answering else ""
                self._say(f"\n{stopped}Ctrl-C again leaves")
            except LoopServeError as error:
                for reason in str(error).splitlines():
                    self._say(f"error: {reason}")
            except Exception as error:  # out of memory, a broken plugin: the turn was taken back, the talk goes on
                self._say(
                    f"error: {unexpected(error)}; the conversation stands at its last complete turn, /save keeps it"
                )

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            self._command(*line.split(maxsplit=1))
        elif line:
            # Closed at once when interrupted: that is what takes the unfinished turn back.
            with closing(cast(Any, self.conversation.stream(line, **self.sampling))) as pieces:
                for piece in pieces:
                    self.write(piece)
            self._answered()

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
            case "/undo":
                self._say(f"took back: {self.conversation.undo()['content']}")
            case "/retry":
                self.write(self.conversation.retry(**self.sampling).text)
                self._answered()
            case "/save" if argument:
                self.conversation.save(Path(argument.strip()).expanduser())
                self._say(f"saved to {argument.strip()}")
            case "/save":
                self._say("say where: /save FILE")
            case "/exit":
                raise _Leave
            case _:
                self._say(f"no command {name!r}{did_you_mean(name, _COMMANDS)}")

    def _answered(self) -> None:
        self._say("")
        if self.verbose:
            self._say(turn_line(self.conversation.turns[-1].as_dict()))

    def _say(self, text: str) -> None:
        self.write(f"{text}\n")
