"""Store every conversation of ``loopserve chat`` in a database in the user's data folder, turn by turn."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from loopserve.core.errors import ConfigError, InputError, LoopServeError

SCHEMA_VERSION = 1
_WAIT_S = 10.0  # to wait for another process that writes
_SCHEMA = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    started TEXT NOT NULL,
    updated TEXT NOT NULL,
    model TEXT NOT NULL,
    revision TEXT,
    stack TEXT NOT NULL,
    system TEXT,
    writes INTEGER NOT NULL
);
CREATE TABLE turns (
    conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    at TEXT NOT NULL,
    state TEXT NOT NULL,
    message TEXT NOT NULL,
    answer TEXT NOT NULL,
    reasoning TEXT NOT NULL,
    token_ids TEXT NOT NULL,
    stats TEXT NOT NULL,
    PRIMARY KEY (conversation, number)
);
"""


class TurnState(StrEnum):
    OPEN = "open"  # the answer is being written, or the process was killed meanwhile
    ANSWERED = "answered"  # part of the conversation
    STOPPED = "stopped"  # by Ctrl-C, with the answer so far
    FAILED = "failed"  # with an error in place of the answer
    UNDONE = "undone"  # taken back by /undo
    REPLACED = "replaced"  # replaced by another answer, see /retry


UNANSWERED = (TurnState.OPEN, TurnState.STOPPED, TurnState.FAILED)


@dataclass
class LoggedTurn:
    """Hold one message and its outcome. answer: also an error message, or the part that was written before Ctrl-C."""

    message: str
    state: TurnState = TurnState.OPEN
    answer: str = ""
    at: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoggedConversation:
    """Hold a conversation of the log. ``id`` 0: not written yet."""

    model: str
    stack: str
    system: str | None = None
    revision: str | None = None
    turns: list[LoggedTurn] = field(default_factory=list)
    id: int = 0
    started: str = ""
    updated: str = ""
    writes: int = 0  # incremented by each writer, to detect a second process that continues the conversation

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Return the complete turns as messages with the answers' tokens, without turns that were undone or not answered."""
        messages: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            if turn.state is TurnState.ANSWERED:
                messages.append({"role": "user", "content": turn.message})
                answer: dict[str, Any] = {"role": "assistant", "content": turn.answer}
                if turn.reasoning:
                    answer["reasoning_content"] = turn.reasoning
                if turn.token_ids:
                    answer["token_ids"] = turn.token_ids
                messages.append(answer)
        return messages

    def take_over(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Begin with the turns of messages that come from elsewhere."""
        for message in messages:
            if message["role"] == "user":
                self.turns.append(LoggedTurn(message["content"], at=now()))
            elif message["role"] == "assistant":
                self.turns[-1].state, self.turns[-1].answer = TurnState.ANSWERED, message["content"]
                self.turns[-1].reasoning = message.get("reasoning_content", "")
            elif not self.turns:
                self.system = message["content"]

    @property
    def unanswered(self) -> str | None:
        """Return the last message, if it has no answer."""
        last = self.turns[-1] if self.turns else None
        return last.message if last is not None and last.state in UNANSWERED else None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "writes"} | {"messages": self.messages}


def default_path() -> Path:
    """Return the path of the log: ``loopserve/logs.db`` in the user's data folder (XDG_DATA_HOME)."""
    from platformdirs import user_data_path

    return user_data_path("loopserve", appauthor=False) / "logs.db"


class ChatLog:
    """Read and write the log. Nothing is created before the first write. Every operation opens the file itself."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()

    def conversations(self, *, word: str | None = None, limit: int | None = None) -> list[LoggedConversation]:
        """Return conversations, the latest first. word: only those that contain it, ignoring case."""
        conversations = []
        with self._reading() as database:
            if database is None:
                return []
            for (number,) in database.execute("SELECT id FROM conversations ORDER BY updated DESC, id DESC").fetchall():
                conversation = _loaded(database, number)
                if word is None or _holds(conversation, word):
                    conversations.append(conversation)
                if limit is not None and len(conversations) >= limit:
                    break
        return conversations

    def conversation(self, number: int) -> LoggedConversation:
        """Return one conversation. Raises InputError if its number does not exist."""
        with self._reading() as database:
            if database is not None and _exists(database, number):
                return _loaded(database, number)
        raise InputError(f"no conversation {number} in {self.path}: loopserve logs lists them")

    def last(self) -> LoggedConversation:
        """Return the conversation that was written last. Raises InputError if there is none."""
        conversations = self.conversations(limit=1)
        if not conversations:
            raise InputError(f"there is no conversation to go on with: {self.path} holds none")
        return conversations[0]

    def remove(self, numbers: Sequence[int]) -> None:
        """Delete conversations and overwrite their text. Raises InputError, and deletes none, if one does not exist."""
        for number in numbers:
            self.conversation(number)
        with self._writing() as database:
            database.executemany("DELETE FROM conversations WHERE id = ?", [(number,) for number in numbers])
        with self._open() as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the text is in the journal as well

    def write(self, conversation: LoggedConversation, turns: Sequence[int]) -> None:
        """Write the turns of these numbers, and the conversation itself if it is new.

        If another process has changed or deleted the conversation meanwhile, all turns of this one are written as a new
        conversation, so that the turns of two processes never mix. Raises sqlite3.Error or OSError.
        """
        moment = now()
        with self._writing() as database:
            row = database.execute("SELECT writes FROM conversations WHERE id = ?", (conversation.id,)).fetchone()
            number, writes, started = conversation.id, conversation.writes + 1, conversation.started or moment
            if row is None or row[0] != conversation.writes:
                number, writes, turns = self._insert(database, conversation, started), 1, range(len(conversation.turns))
            database.execute("UPDATE conversations SET updated = ?, writes = ? WHERE id = ?", (moment, writes, number))
            database.executemany(
                "INSERT OR REPLACE INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [(number, each, *_row(conversation.turns[each])) for each in turns],
            )
        conversation.id, conversation.writes = number, writes
        conversation.started, conversation.updated = started, moment

    def _insert(self, database: sqlite3.Connection, new: LoggedConversation, started: str) -> int:
        values = (started, started, new.model, new.revision, new.stack, new.system)
        done = database.execute(
            "INSERT INTO conversations (started, updated, model, revision, stack, system, writes) "
            "VALUES (?, ?, ?, ?, ?, ?, 0)",
            values,
        )
        assert done.lastrowid is not None
        return done.lastrowid

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """Return the database, or None if there is no file yet. Raises ConfigError for a file that is not a log."""
        if not self.path.exists():
            yield None
            return
        try:
            with self._open() as database:
                yield database
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"{self.path}: cannot read the log of conversations ({error})") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):  # conversations are private: only the user may read the file
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.rollback()
                raise
            database.commit()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise ConfigError(f"{self.path}: written by a newer loopserve (version {version}): update loopserve")
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("PRAGMA secure_delete = ON")
            database.execute("PRAGMA synchronous = FULL")
            if version == 0:
                database.execute("PRAGMA journal_mode = WAL")
                _create(database)
            yield database


def _create(database: sqlite3.Connection) -> None:
    database.execute("BEGIN IMMEDIATE")
    if database.execute("PRAGMA user_version").fetchone() == (0,):  # another process may have created it first
        for statement in filter(str.strip, _SCHEMA.split(";")):
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    database.commit()


def _exists(database: sqlite3.Connection, number: int) -> bool:
    return database.execute("SELECT 1 FROM conversations WHERE id = ?", (number,)).fetchone() is not None


def _loaded(database: sqlite3.Connection, number: int) -> LoggedConversation:
    model, stack, system, revision, started, updated, writes = database.execute(
        "SELECT model, stack, system, revision, started, updated, writes FROM conversations WHERE id = ?", (number,)
    ).fetchone()
    turns = [
        LoggedTurn(message, TurnState(state), answer, at, reasoning, json.loads(tokens), json.loads(stats))
        for at, state, message, answer, reasoning, tokens, stats in database.execute(
            "SELECT at, state, message, answer, reasoning, token_ids, stats FROM turns "
            "WHERE conversation = ? ORDER BY number",
            (number,),
        )
    ]
    return LoggedConversation(model, stack, system, revision, turns, number, started, updated, writes)


def _row(turn: LoggedTurn) -> tuple[str, ...]:
    tokens, stats = json.dumps(turn.token_ids), json.dumps(turn.stats, default=str)
    return (turn.at, str(turn.state), _text(turn.message), _text(turn.answer), _text(turn.reasoning), tokens, stats)


def _text(text: str) -> str:
    """Return text that can be stored. Lone surrogates cannot; the model's tokenizer refuses such a message anyway."""
    return text.encode("utf-8", "replace").decode()


def _holds(conversation: LoggedConversation, word: str) -> bool:
    sought = word.casefold()
    return any(sought in text.casefold() for turn in conversation.turns for text in (turn.message, turn.answer))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
