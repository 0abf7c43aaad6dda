"""Keep conversations in sqlite: what is committed here is the conversation; KV files are a cache beside it.

Every method blocks. ``Store`` is used by one thread at a time.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

from loopserve.core.errors import ConfigError
from loopserve.serve.records import KVRow, Path, StoredSession, StoredTurn, pack_tokens, unpack_tokens
from loopserve.serve.schema import KV_TABLE, OBJECTS, SCHEMA_VERSION, TABLES, refused

_log = logging.getLogger("loopserve.serve")
_IN_MEMORY = ("spare", "volatile")  # what the disk does not take; what is not to be kept
_WAIT_S = 5.0  # for another process that writes
_TURN = (
    "id, session, parent, tenant, model, stack, digest, messages, answer, prompt_tokens, output_tokens, created, finish_reason, "
    "figures"
)


class Store:
    """Hold sessions and turns. Without a directory, or while the disk takes nothing, they are in memory only.

    The attached database ``spare`` takes what the disk does not; the next commit that succeeds moves it over. ``volatile`` takes
    what its client does not want to have kept.
    """

    def __init__(self, directory: FilePath | None) -> None:
        """Open or create the database of a session directory. Raises ConfigError if that cannot be done."""
        self.directory = directory
        self.spare_turns = 0  # committed in memory only, since the disk refused them
        try:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                created = os.open(directory / "index.sqlite", os.O_CREAT | os.O_RDWR, 0o600)
                os.close(created)
            name = ":memory:" if directory is None else str(directory / "index.sqlite")
            self._db = sqlite3.connect(name, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            for db in _IN_MEMORY:
                self._db.execute(f"ATTACH ':memory:' AS {db}")
            (version,) = self._db.execute("PRAGMA main.user_version").fetchone()
            if version not in (0, SCHEMA_VERSION):
                raise ConfigError(
                    f"{name}: written by another version of loopserve (schema {version}); use another directory"
                )
            for db in ("main", *_IN_MEMORY):
                self._db.executescript(TABLES.format(db=db))
            self._db.executescript(KV_TABLE)
            for db in ("main", "spare"):
                self._db.executescript(OBJECTS.format(db=db))
            self._db.execute(f"PRAGMA main.user_version={SCHEMA_VERSION}")
            for table in ("sessions", "turns"):
                parts = [f"SELECT * FROM main.{table}"]
                for db in _IN_MEMORY:
                    parts = [
                        f"{part} {'AND' if 'WHERE' in part else 'WHERE'} id NOT IN (SELECT id FROM {db}.{table})"
                        for part in parts
                    ]
                    parts.append(f"SELECT * FROM {db}.{table}")
                self._db.execute(f"CREATE TEMP VIEW every_{table} AS {' UNION ALL '.join(parts)}")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"--session-dir {directory}: cannot be used ({error}); give a directory that this user may write to"
            ) from error

    def close(self) -> None:
        """Close the database. What the disk did not take is tried once more."""
        self._settle()
        self._db.close()

    # Turns.

    def commit(self, path: Path, session: StoredSession, *, keep: bool = True) -> bool:
        """Write the last turn of a path, and its session, in one transaction. Return False if only memory took them.

        keep: False leaves them in memory until the server ends. Turns before it that were left there are written with it.
        """
        if not keep:
            self._write("volatile", [path.turns[-1]], [session])
            return False
        self._settle()
        before = [turn for turn in path.turns[:-1] if self._is_volatile(turn.id)]
        try:
            self._write("main", [*before, path.turns[-1]], [session])
        except sqlite3.DatabaseError as error:
            if not refused(error):
                raise
            _log.error("a turn is kept in memory only: the session directory takes nothing (%s)", error)
            self._write("spare", [*before, path.turns[-1]], [session])
            self.spare_turns += 1
            return False
        self._db.executemany("DELETE FROM volatile.turns WHERE id=?", [(turn.id,) for turn in before])
        self._db.execute("DELETE FROM volatile.sessions WHERE id=?", (session.id,))
        return True

    def _is_volatile(self, turn: str) -> bool:
        return self._db.execute("SELECT 1 FROM volatile.turns WHERE id=?", (turn,)).fetchone() is not None

    def is_kept(self, turn: str) -> bool:
        """Return whether a turn was to be kept, and is not in memory only because its request said so."""
        return not self._is_volatile(turn)

    def _settle(self) -> None:
        """Move what the disk did not take to it, if it takes it now."""
        if not self.spare_turns:
            return
        turns = [_turn(row) for row in self._db.execute(f"SELECT {_TURN} FROM spare.turns ORDER BY created")]
        sessions = [StoredSession(*row) for row in self._db.execute("SELECT * FROM spare.sessions")]
        try:
            self._write("main", turns, sessions)
            self._db.execute("INSERT OR REPLACE INTO main.objects SELECT * FROM spare.objects")
        except sqlite3.DatabaseError as error:
            if not refused(error):
                raise
            return
        with self._transaction("spare"):
            for table in ("turns", "sessions", "objects"):
                self._db.execute(f"DELETE FROM spare.{table}")
        self.spare_turns = 0

    def _write(self, db: str, turns: Iterable[StoredTurn], sessions: Iterable[StoredSession]) -> None:
        with self._transaction(db):
            self._db.executemany(
                f"INSERT OR REPLACE INTO {db}.turns ({_TURN}) VALUES ({', '.join('?' * 14)})", map(_row, turns)
            )
            self._db.executemany(
                f"INSERT OR REPLACE INTO {db}.sessions VALUES (?, ?, ?, ?, ?, ?)",
                [(s.id, s.tenant, s.key, s.head, s.created, s.updated) for s in sessions],
            )

    @contextmanager
    def _transaction(self, db: str = "main") -> Iterator[None]:
        """Commit what the block does, or nothing of it. A transaction of the databases in memory does not lock the one on disk."""
        self._db.execute("BEGIN IMMEDIATE" if db == "main" else "BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def turn(self, tenant: str, turn: str) -> StoredTurn | None:
        """Return a turn of a tenant by its id."""
        row = self._db.execute(f"SELECT {_TURN} FROM every_turns WHERE id=? AND tenant=?", (turn, tenant)).fetchone()
        return None if row is None else _turn(row)

    def path(self, tenant: str, turn: str) -> Path | None:
        """Return the turns from the root to a turn. None if the turn, or one before it, is not there."""
        found: list[StoredTurn] = []
        wanted: str | None = turn
        while wanted is not None:
            each = self.turn(tenant, wanted)
            if each is None:
                return None
            found.append(each)
            wanted = each.parent
        return Path(tuple(reversed(found)))

    def find(self, tenant: str, model: str, digests: Sequence[bytes], session: str | None = None) -> list[StoredTurn]:
        """Return the latest turn for each digest that is known, those of ``session`` first, longest conversations first."""
        order = {digest: number for number, digest in enumerate(digests)}
        found: dict[bytes, StoredTurn] = {}
        for start in range(0, len(digests), 500):
            part = digests[start : start + 500]
            rows = self._db.execute(
                f"SELECT {_TURN} FROM every_turns WHERE tenant=? AND model=? AND digest IN ({', '.join('?' * len(part))}) "
                "ORDER BY (session = ?), created",
                (tenant, model, *part, session),
            )
            found |= {turn.digest: turn for turn in map(_turn, rows)}
        return sorted(found.values(), key=lambda turn: order[turn.digest])

    # Sessions.

    def session(self, tenant: str, session: str) -> StoredSession | None:
        """Return a session of a tenant by its id."""
        row = self._db.execute("SELECT * FROM every_sessions WHERE id=? AND tenant=?", (session, tenant)).fetchone()
        return None if row is None else StoredSession(*row)

    def session_by_key(self, tenant: str, key: str) -> StoredSession | None:
        """Return the latest session that a client named so."""
        row = self._db.execute(
            "SELECT * FROM every_sessions WHERE tenant=? AND key=? ORDER BY updated DESC LIMIT 1", (tenant, key)
        ).fetchone()
        return None if row is None else StoredSession(*row)

    def sessions(self, tenant: str | None = None, limit: int = -1) -> list[StoredSession]:
        """Return the sessions of a tenant, or of all (None), latest first."""
        rows = self._db.execute(
            "SELECT * FROM every_sessions WHERE ?1 IS NULL OR tenant=?1 ORDER BY updated DESC LIMIT ?2", (tenant, limit)
        )
        return [StoredSession(*row) for row in rows]

    def title(self, tenant: str, turn: str) -> tuple[str, int]:
        """Return the first message of a user on the path to a turn, and the number of turns of the path."""
        number, first, at = 0, "[]", turn
        while at is not None:  # sqlite scans whole tables for a recursive query over the view
            row = self._db.execute(
                "SELECT messages, parent FROM every_turns WHERE id=? AND tenant=?", (at, tenant)
            ).fetchone()
            if row is None:
                break
            number, (first, at) = number + 1, row
        questions = [each["content"] for each in json.loads(first) if each["role"] == "user"]
        return (questions[0] if questions else ""), number

    def put_session(self, session: StoredSession) -> None:
        """Write a session."""
        if not self.spare_turns:
            try:
                self._write("main", [], [session])
                return
            except sqlite3.DatabaseError as error:
                if not refused(error):
                    raise
                _log.error("a session is kept in memory only: the session directory takes nothing (%s)", error)
        self._write("spare", [], [session])
        self.spare_turns += 1

    def remove_session(self, tenant: str, session: str) -> list[str]:
        """Remove a session, with the turns that no other session goes through. Return the ids of these turns."""
        found = self.session(tenant, session)
        if found is None:
            return []
        kept = {
            turn.id
            for each in self.sessions(tenant)
            if each.id != session and each.head is not None
            for turn in (self.path(tenant, each.head) or Path()).turns
        }
        own = [row[0] for row in self._db.execute("SELECT id FROM every_turns WHERE session=?", (session,))]
        through = self.path(tenant, found.head) if found.head is not None else None
        gone = sorted({*own, *(through.ids if through is not None else ())} - kept)
        with self._transaction():
            for db in ("main", *_IN_MEMORY):
                self._db.execute(f"DELETE FROM {db}.sessions WHERE id=?", (session,))
                self._db.executemany(f"DELETE FROM {db}.turns WHERE id=?", [(each,) for each in gone])
            for db in ("main", "spare"):
                self._db.executemany(f"DELETE FROM {db}.objects WHERE id=?", [(each,) for each in (session, *gone)])
        return gone

    def remove_turn(self, tenant: str, turn: str) -> bool:
        """Remove a turn that no other turn goes on from; the sessions at it move back by one. Return False if one goes on from it."""
        found = self.turn(tenant, turn)
        if found is None or self._db.execute("SELECT 1 FROM every_turns WHERE parent=?", (turn,)).fetchone():
            return False
        with self._transaction():
            for db in ("main", *_IN_MEMORY):
                moved = (found.parent, turn, tenant)
                self._db.execute(f"UPDATE {db}.sessions SET head=? WHERE head=? AND tenant=?", moved)
                self._db.execute(f"DELETE FROM {db}.turns WHERE id=?", (turn,))
            for db in ("main", "spare"):
                self._db.execute(f"DELETE FROM {db}.objects WHERE id=?", (turn,))
        return True

    # What the API keeps beside them.

    def put_object(self, tenant: str, name: str, body: dict[str, Any]) -> None:
        """Keep a JSON object under the id of a turn or session."""
        for db in ("main", "spare"):
            try:
                self._db.execute(
                    f"INSERT OR REPLACE INTO {db}.objects VALUES (?, ?, ?)", (name, tenant, json.dumps(body))
                )
                return
            except sqlite3.DatabaseError as error:
                if not refused(error) or db == "spare":
                    raise
                _log.error("a response is kept in memory only: the session directory takes nothing (%s)", error)

    def object(self, tenant: str, name: str) -> dict[str, Any] | None:
        """Return what was kept under an id; None if nothing was."""
        for db in ("spare", "main"):
            row = self._db.execute(f"SELECT body FROM {db}.objects WHERE id=? AND tenant=?", (name, tenant)).fetchone()
            if row is not None:
                found: dict[str, Any] = json.loads(row[0])
                return found
        return None

    def expired(self, older_than_s: float) -> list[StoredSession]:
        """Return the sessions that were last used longer ago than that."""
        rows = self._db.execute("SELECT * FROM every_sessions WHERE updated < ?", (time.time() - older_than_s,))
        return [StoredSession(*row) for row in rows]

    # Manifest of the KV files.

    def put_kv(self, turn: str, file: str, size: int, sha256: str, manifest: dict[str, Any]) -> None:
        """Say that a file holds the pairs of a turn: from here on it counts."""
        self._db.execute(
            "INSERT OR REPLACE INTO main.kv VALUES (?, ?, ?, ?, ?, ?)",
            (turn, file, size, sha256, json.dumps(manifest), time.time()),
        )

    def kv(self, turn: str) -> KVRow | None:
        """Return the row of the file that holds a turn's pairs; None if there is none."""
        row = self._db.execute(
            "SELECT turn, file, bytes, sha256, manifest FROM main.kv WHERE turn=?", (turn,)
        ).fetchone()
        return None if row is None else _kv_row(row)

    def every_kv(self) -> list[KVRow]:
        """Return the rows of all files, oldest first."""
        rows = self._db.execute("SELECT turn, file, bytes, sha256, manifest FROM main.kv ORDER BY created")
        return [_kv_row(row) for row in rows]

    def drop_kv(self, turns: Iterable[str]) -> None:
        """Forget the files of turns."""
        self._db.executemany("DELETE FROM main.kv WHERE turn=?", [(each,) for each in turns])


def _row(turn: StoredTurn) -> tuple[Any, ...]:
    return (
        turn.id,
        turn.session,
        turn.parent,
        turn.tenant,
        turn.model,
        turn.stack,
        turn.digest,
        json.dumps(turn.messages),
        json.dumps(turn.answer),
        pack_tokens(turn.prompt_tokens),
        pack_tokens(turn.output_tokens),
        turn.created,
        turn.finish_reason,
        json.dumps(turn.figures),
    )


def _turn(row: Sequence[Any]) -> StoredTurn:
    (id_, session, parent, tenant, model, stack, digest, messages, answer, prompt, output, created, finish, figures) = (
        row
    )
    return StoredTurn(
        id_,
        session,
        parent,
        tenant,
        model,
        stack,
        bytes(digest),
        tuple(json.loads(messages)),
        json.loads(answer),
        unpack_tokens(prompt),
        unpack_tokens(output),
        created,
        finish,
        json.loads(figures),
    )


def _kv_row(row: Sequence[Any]) -> KVRow:
    turn, file, size, sha256, manifest = row
    return KVRow(turn, file, size, sha256, json.loads(manifest))
