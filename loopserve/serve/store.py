"""Keep conversations in sqlite: what is committed here is the conversation; KV files are a cache beside it.

Every method blocks. ``Store`` is used by one thread at a time.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any

from loopserve.core.errors import ConfigError
from loopserve.serve.records import KVRow, Path, StoredSession, StoredTurn
from loopserve.serve.rows import DAMAGE, KV, TURN, Rows, is_cache_file, read_text
from loopserve.serve.schema import KV_TABLE, OBJECTS, SCHEMA_VERSION, TABLES, refused
from loopserve.serve.sealing import Sealer

_log = logging.getLogger("loopserve.serve")
_IN_MEMORY = ("spare", "volatile")  # what the disk does not take; what is not to be kept
_MARK = "loopserve sealed"  # id of the object that tells whether a directory has a key, and which
_DIGEST, _PARENT = (TURN.split(", ").index(each) for each in ("digest", "parent"))
_WAIT_S = 5.0  # for another process that writes


class Store:
    """Hold sessions and turns. Without a directory, or while the disk takes nothing, they are in memory only.

    The attached database ``spare`` takes what the disk does not; the next commit that succeeds moves it over. ``volatile`` takes
    what its client does not want to have kept.
    """

    def __init__(self, directory: FilePath | None, sealer: Sealer | None = None) -> None:
        """Open or create the database of a session directory. Raises ConfigError if that cannot be done.

        sealer: encrypts what people wrote; a directory that was begun with a key is used with this key only.
        """
        self.directory, self.sealer = directory, sealer or Sealer()
        self._rows = Rows(self.sealer)
        self.spare_turns = 0  # turns, sessions and objects in memory only, since the disk refused them
        try:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                created = os.open(directory / "index.sqlite", os.O_CREAT | os.O_RDWR, 0o600)
                os.close(created)
            name = ":memory:" if directory is None else str(directory / "index.sqlite")
            self._db = sqlite3.connect(name, timeout=_WAIT_S, check_same_thread=False, isolation_level=None)
            self._db.text_factory = read_text
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
                    other = f"id NOT IN (SELECT id FROM {db}.{table})"
                    parts = [f"{part} {'AND' if 'WHERE' in part else 'WHERE'} {other}" for part in parts]
                    parts.append(f"SELECT * FROM {db}.{table}")
                self._db.execute(f"CREATE TEMP VIEW every_{table} AS {' UNION ALL '.join(parts)}")
            self._check_key()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"--session-dir {directory}: cannot be used ({error}); give a directory that this user may write to"
            ) from error

    def _check_key(self) -> None:
        """Raise ConfigError if what is in the database does not open with the key that was given, or with none."""
        row = self._db.execute("SELECT body FROM main.objects WHERE id=?", (_MARK,)).fetchone()
        if row is None:
            if self.sealer.active and self._db.execute("SELECT 1 FROM main.sessions").fetchone() is not None:
                raise ConfigError(f"--session-dir {self.directory}: it was begun without a key; give another directory")
            if self.sealer.active:
                mark = (_MARK, "", self.sealer.seal_text(_MARK, _MARK))
                self._db.execute("INSERT INTO main.objects VALUES (?, ?, ?)", mark)
            return
        if not self.sealer.active:
            raise ConfigError(f"--session-dir {self.directory}: it is encrypted; give its key by --session-key-file")
        try:
            self.sealer.open_text(row[0], _MARK)
        except ValueError as error:
            raise ConfigError(
                f"--session-dir {self.directory}: the key of --session-key-file is not its key"
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
        before = [turn.id for turn in path.turns[:-1] if self._is_volatile(turn.id)]
        try:
            self._write("main", [path.turns[-1]], [session], before)
        except sqlite3.DatabaseError as error:
            if not refused(error):
                raise
            _log.error("a turn is kept in memory only: the session directory takes nothing (%s)", error)
            self._write("spare", [path.turns[-1]], [session], before)
            self.spare_turns += 1
            return False
        self._db.executemany("DELETE FROM volatile.turns WHERE id=?", [(turn,) for turn in before])
        for db in _IN_MEMORY:
            self._db.execute(f"DELETE FROM {db}.sessions WHERE id=?", (session.id,))
        return True

    def _is_volatile(self, turn: str) -> bool:
        return self._db.execute("SELECT 1 FROM volatile.turns WHERE id=?", (turn,)).fetchone() is not None

    def _settle(self) -> None:
        """Move what the disk did not take to it, if it takes it now."""
        if not self.spare_turns:
            return
        try:
            with self._transaction():
                for table in ("turns", "sessions", "objects"):
                    self._db.execute(f"INSERT OR REPLACE INTO main.{table} SELECT * FROM spare.{table}")
        except sqlite3.DatabaseError as error:
            if not refused(error):
                raise
            return
        with self._transaction("spare"):
            for table in ("turns", "sessions", "objects"):
                self._db.execute(f"DELETE FROM spare.{table}")
        self.spare_turns = 0

    def _write(
        self, db: str, turns: Iterable[StoredTurn], sessions: Iterable[StoredSession], volatile: Iterable[str] = ()
    ) -> None:
        """volatile: ids of turns that lie in the database of this name so far."""
        with self._transaction(db):
            for each in volatile:
                self._db.execute(f"INSERT OR REPLACE INTO {db}.turns SELECT * FROM volatile.turns WHERE id=?", (each,))
            self._db.executemany(
                f"INSERT OR REPLACE INTO {db}.turns ({TURN}) VALUES ({', '.join('?' * 14)})",
                map(self._rows.of_turn, turns),
            )
            self._db.executemany(
                f"INSERT OR REPLACE INTO {db}.sessions VALUES (?, ?, ?, ?, ?, ?)", map(self._rows.of_session, sessions)
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
        row = self._db.execute(f"SELECT {TURN} FROM every_turns WHERE id=? AND tenant=?", (turn, tenant)).fetchone()
        return None if row is None else self._turn(row)

    def _turn(self, row: Sequence[Any], digest: bytes | None = None) -> StoredTurn | None:
        """Return the turn of a row; None for a damaged one, whose conversation is computed from the messages of its client."""
        try:
            return self._rows.turn(row, digest)
        except DAMAGE as error:
            _log.error("turn %s cannot be read: %s", row[0], error)
            return None

    def path(self, tenant: str, turn: str) -> Path | None:
        """Return the turns from the root to a turn. None if the turn, or one before it, is not there, or comes before itself."""
        found: dict[str, StoredTurn] = {}
        wanted: str | None = turn
        while wanted is not None:
            each = None if wanted in found else self.turn(tenant, wanted)
            if each is None:
                if wanted in found:
                    _log.error("turn %s is damaged: it would come before itself", wanted)
                return None
            found[wanted] = each
            wanted = each.parent
        return Path(tuple(reversed(found.values())))

    def find(self, tenant: str, model: str, digests: Sequence[bytes], session: str | None = None) -> list[StoredTurn]:
        """Return the latest turn for each digest that is known, those of ``session`` first, longest conversations first."""
        order = {digest: number for number, digest in enumerate(digests)}
        kept = {self.sealer.index(digest): digest for digest in digests}
        found: dict[bytes, StoredTurn] = {}
        for part in (list(kept)[start : start + 500] for start in range(0, len(digests), 500)):
            rows = self._db.execute(
                f"SELECT {TURN} FROM every_turns WHERE tenant=? AND model=? AND digest IN ({', '.join('?' * len(part))}) "
                "ORDER BY (session = ?), created",
                (tenant, model, *part, session),
            )
            for row in rows:
                turn = self._turn(row, kept[bytes(row[_DIGEST])])
                if turn is not None:
                    found[turn.digest] = turn
        return sorted(found.values(), key=lambda turn: order[turn.digest])

    # Sessions.

    def session(self, tenant: str, session: str) -> StoredSession | None:
        """Return a session of a tenant by its id."""
        row = self._db.execute("SELECT * FROM every_sessions WHERE id=? AND tenant=?", (session, tenant)).fetchone()
        return None if row is None else self._rows.session(row)

    def sessions(self, tenant: str | None = None, limit: int = -1) -> list[StoredSession]:
        """Return the sessions of a tenant, or of all (None), latest first."""
        rows = self._db.execute(
            "SELECT * FROM every_sessions WHERE ?1 IS NULL OR tenant=?1 ORDER BY updated DESC LIMIT ?2", (tenant, limit)
        )
        return [self._rows.session(row) for row in rows]

    def title(self, tenant: str, turn: str) -> tuple[str, int]:
        """Return the first message of a user on the path to a turn, and the number of turns of the path."""
        first, at, seen = None, turn, set[str]()
        while at is not None and at not in seen:  # sqlite scans whole tables for a recursive query over the view
            row = self._db.execute(f"SELECT {TURN} FROM every_turns WHERE id=? AND tenant=?", (at, tenant)).fetchone()
            if row is None:
                break
            seen.add(at)
            first, at = row, row[_PARENT]
        number = len(seen)
        try:
            messages = [] if first is None else self._rows.messages(first)
        except DAMAGE:  # the session is listed without a title
            messages = []
        questions = [each["content"] for each in messages if each["role"] == "user"]
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
        """Remove a session, with the turns that nothing else goes on from or is at. Return the ids of these turns."""
        found = self.session(tenant, session)
        if found is None:
            return []
        own = self._db.execute("SELECT id FROM every_turns WHERE session=? ORDER BY created DESC", (session,))
        through = self.path(tenant, found.head) if found.head is not None else None
        waiting = [*(row[0] for row in own), *(reversed(through.ids) if through is not None else ())]
        gone: dict[str, None] = {}
        while waiting:
            turn = waiting.pop(0)
            if turn in gone or self._is_needed(turn, session, gone):
                continue
            gone[turn] = None
            waiting += self._left_behind(turn, session)
        gone |= dict.fromkeys(self._circle(session))
        with self._transaction():
            for db in ("main", *_IN_MEMORY):
                self._db.execute(f"DELETE FROM {db}.sessions WHERE id=?", (session,))
                self._db.executemany(f"DELETE FROM {db}.turns WHERE id=?", [(each,) for each in gone])
            for db in ("main", "spare"):
                self._db.executemany(f"DELETE FROM {db}.objects WHERE id=?", [(each,) for each in (session, *gone)])
        return sorted(gone)

    def _circle(self, session: str) -> list[str]:
        """Return turns that come before themselves, by damage, and before one of a session: nobody can go on from them."""
        rows = self._db.execute("SELECT id, parent FROM every_turns WHERE session=?", (session,))
        parents: dict[str, str | None] = dict(rows.fetchall())
        found, done = list[str](), set[str]()
        for turn in tuple(parents):
            path: dict[str, None] = {}
            at: str | None = turn
            while at is not None and at not in done and at not in path:
                path[at] = None
                if at not in parents:  # a turn of another session
                    row = self._db.execute("SELECT parent FROM every_turns WHERE id=?", (at,)).fetchone()
                    parents[at] = None if row is None else row[0]
                at = parents[at]
            if at in path:
                passed = list(path)
                circle = passed[passed.index(at) :]
                heads = (
                    self._db.execute("SELECT 1 FROM every_sessions WHERE head=? AND id<>?", (each, session))
                    for each in circle
                )
                if not any(head.fetchone() for head in heads):
                    found += circle
            done.update(path)
        return found

    def _is_needed(self, turn: str, session: str, gone: Container[str]) -> bool:
        """Return whether another session is at a turn, or a turn that stays goes on from it."""
        at = self._db.execute("SELECT 1 FROM every_sessions WHERE head=? AND id<>?", (turn, session)).fetchone()
        children = self._db.execute("SELECT id FROM every_turns WHERE parent=?", (turn,))
        return at is not None or any(child not in gone for (child,) in children)

    def _left_behind(self, turn: str, session: str) -> list[str]:
        """Return the turn before a removed one, if only that one kept it: its own session is removed as well, or was."""
        row = self._db.execute("SELECT parent FROM every_turns WHERE id=?", (turn,)).fetchone()
        if row is None or row[0] is None:
            return []
        before = self._db.execute("SELECT session FROM every_turns WHERE id=?", (row[0],)).fetchone()
        if before is None:
            return []
        alive = self._db.execute("SELECT 1 FROM every_sessions WHERE id=?", before).fetchone() is not None
        return [] if alive and before[0] != session else [row[0]]

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
        row = (name, tenant, self.sealer.seal_text(json.dumps(body), f"{tenant} {name} object"))
        self._settle()
        try:
            self._db.execute("INSERT OR REPLACE INTO main.objects VALUES (?, ?, ?)", row)
        except sqlite3.DatabaseError as error:
            if not refused(error):
                raise
            _log.error("a response is kept in memory only: the session directory takes nothing (%s)", error)
            self._db.execute("INSERT OR REPLACE INTO spare.objects VALUES (?, ?, ?)", row)
            self.spare_turns += 1
        else:
            self._db.execute("DELETE FROM spare.objects WHERE id=?", (name,))

    def object(self, tenant: str, name: str) -> dict[str, Any] | None:
        """Return what was kept under an id; None if nothing was, or if it is damaged."""
        for db in ("spare", "main"):
            row = self._db.execute(f"SELECT body FROM {db}.objects WHERE id=? AND tenant=?", (name, tenant)).fetchone()
            if row is None:
                continue
            try:
                found = json.loads(self.sealer.open_text(row[0], f"{tenant} {name} object"))
                if isinstance(found, dict):
                    return found
                raise ValueError("it is no object")
            except DAMAGE as error:
                _log.error("what was kept under %s cannot be read: %s", name, error)
        return None

    def expired(self, older_than_s: float) -> list[StoredSession]:
        """Return the sessions that were last used longer ago than that."""
        rows = self._db.execute("SELECT * FROM every_sessions WHERE updated < ?", (time.time() - older_than_s,))
        return [self._rows.session(row) for row in rows]

    # Manifest of the KV files.

    def put_kv(self, turn: str, file: str, size: int, sha256: str, manifest: dict[str, Any]) -> None:
        """Say that a file holds the pairs of a turn: from here on it counts."""
        self._db.execute(
            "INSERT OR REPLACE INTO main.kv VALUES (?, ?, ?, ?, ?, ?)",
            (turn, file, size, sha256, self.sealer.seal_text(json.dumps(manifest), f"{file} {turn}"), time.time()),
        )

    def kv(self, turn: str) -> KVRow | None:
        """Return the row of the file that holds a turn's pairs; None if there is none. A damaged one is dropped."""
        row = self._db.execute(f"SELECT {KV} FROM main.kv WHERE turn=?", (turn,)).fetchone()
        try:
            return None if row is None else self._rows.kv(row)
        except DAMAGE as error:
            _log.error("the manifest of turn %s cannot be read and is dropped: %s", turn, error)
            self.drop_kv([turn])
            return None

    def every_kv(self) -> list[KVRow]:
        """Return the rows of all files, oldest first, without damaged ones."""
        return [row for _, _, row in self._every_kv() if isinstance(row, KVRow)]

    def damaged_kv(self) -> list[tuple[str, str, str]]:
        """Return turn, file and reason of every damaged row."""
        return [(turn, str(file), str(row)) for turn, file, row in self._every_kv() if not isinstance(row, KVRow)]

    def _every_kv(self) -> Iterator[tuple[str, Any, KVRow | Exception]]:
        for row in self._db.execute(f"SELECT {KV} FROM main.kv ORDER BY created").fetchall():
            try:
                yield row[0], row[1], self._rows.kv(row)
            except DAMAGE as error:
                yield row[0], row[1], error

    def kv_sizes(self) -> list[tuple[str, str, int]]:
        """Return turn, file and bytes of all files, oldest first."""
        rows = self._db.execute("SELECT turn, file, bytes FROM main.kv ORDER BY created")
        return [row for row in rows if is_cache_file(row[1]) and isinstance(row[2], int)]

    def drop_kv(self, turns: Iterable[str]) -> None:
        """Forget the files of turns. Rows that the disk does not let go are harmless: they name a file that is gone."""
        try:
            self._db.executemany("DELETE FROM main.kv WHERE turn=?", [(each,) for each in turns])
        except sqlite3.DatabaseError as error:
            if not refused(error):
                raise
            _log.error("the rows of cache files stay: the session directory takes nothing (%s)", error)
