"""Write the events of a chat to the log of conversations, turn by turn."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loopserve.cli.chat_log import ChatLog, LoggedConversation, LoggedTurn, TurnState, now
from loopserve.core.errors import LoopServeError


class Recorder:
    """Write each message when it is sent and each answer when it is complete.

    A log that cannot be written (a full disk) does not end the chat. ``warn`` is called once, and the missing turns are written
    with the next turn that can be written.
    """

    def __init__(self, log: ChatLog | None, conversation: LoggedConversation, warn: Callable[[str], None]) -> None:
        """Record to ``log``. None keeps the conversation in memory only."""
        self.conversation = conversation
        self.problem: str | None = None  # reason why the log lacks a part of the conversation
        self._log, self._warn = log, warn
        self._unwritten: set[int] = set()

    @property
    def unanswered(self) -> str | None:
        """Return the last message, if it has no answer."""
        return self.conversation.unanswered

    def asked(self, message: str) -> None:
        """Record a message before it is answered."""
        self.conversation.turns.append(LoggedTurn(message, at=now()))
        self._write(len(self.conversation.turns) - 1)

    def answered(self, answer: str, **details: Any) -> None:
        """Record the answer to the last message. details: other fields of LoggedTurn."""
        self._change(len(self.conversation.turns) - 1, TurnState.ANSWERED, answer, **details)

    def answered_again(self, answer: str, **details: Any) -> None:
        """Record an answer that replaces the last one."""
        replaced = self._last_answered()
        if replaced is not None:
            self._again(replaced, TurnState.ANSWERED, answer, **details)
            self._change(replaced, TurnState.REPLACED)

    def stopped_again(self, answer: str) -> None:
        """Record the part of another answer that was written before it was stopped. The old answer stays valid."""
        kept = self._last_answered()
        if kept is not None and answer:
            self._again(kept, TurnState.UNDONE, answer)

    def stopped(self, answer: str) -> None:
        """Record that Ctrl-C ended the answer."""
        self._change(len(self.conversation.turns) - 1, TurnState.STOPPED, answer)

    def failed(self, error: str) -> None:
        """Record that an error occurred in place of the answer."""
        self._change(len(self.conversation.turns) - 1, TurnState.FAILED, error)

    def undone(self) -> None:
        """Record that the last answered turn was undone."""
        number = self._last_answered()
        if number is not None:
            self._change(number, TurnState.UNDONE)

    def farewell(self) -> str | None:
        """Return how to continue the conversation; None if the log does not contain it."""
        number = self.conversation.id
        if self._log is None or not number or self.problem is not None:
            return None
        return f"logged as conversation {number}; go on with: loopserve chat --continue (or --id {number})"

    def _last_answered(self) -> int | None:
        turns = self.conversation.turns
        return next((n for n in reversed(range(len(turns))) if turns[n].state is TurnState.ANSWERED), None)

    def _again(self, number: int, state: TurnState, answer: str, **details: Any) -> None:
        message = self.conversation.turns[number].message
        self.conversation.turns.append(LoggedTurn(message, state, answer, now(), **details))
        self._write(len(self.conversation.turns) - 1)

    def _change(self, number: int, state: TurnState, answer: str | None = None, **details: Any) -> None:
        turn = self.conversation.turns[number]
        changed = {"state": state} | ({} if answer is None else {"answer": answer}) | details
        self.conversation.turns[number] = replace(turn, **changed)
        self._write(number)

    def _write(self, number: int) -> None:
        if self._log is None:
            return
        self._unwritten.add(number)
        try:
            self._log.write(self.conversation, sorted(self._unwritten))
        except (sqlite3.Error, OSError, LoopServeError) as error:
            if self.problem is None:
                self._warn(f"{self._log.path}: the conversation cannot be logged ({error}); /save FILE keeps it")
            self.problem = str(error)
        else:
            self._unwritten.clear()
            self.problem = None
