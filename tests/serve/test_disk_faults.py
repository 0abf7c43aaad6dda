"""A disk that takes nothing is never an error for a user, and what it took is right; several servers share a directory."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopserve.core import atomic_file
from loopserve.serve.directory import SharedDirectory
from loopserve.serve.kv_files import damaged_files
from loopserve.serve.store import Store
from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, cached, said

ANSWER = "lisbon is amber falcon river ."
CODES = ["FULL", "IOERR", "READONLY", "CANTOPEN", "BUSY", "CORRUPT", "NOTADB"]


class Refusing:
    """Stands in for a connection to a database: refuses statements that change the file, after some of them."""

    def __init__(self, connection: sqlite3.Connection, code: str, after: int, *, reads: bool = False) -> None:
        self._connection, self._code, self.left, self._reads = connection, code, after, reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, sql: str, *arguments: Any) -> Any:
        self._refuse(sql)
        return self._connection.execute(sql, *arguments)

    def executemany(self, sql: str, *arguments: Any) -> Any:
        self._refuse(sql)
        return self._connection.executemany(sql, *arguments)

    def _refuse(self, sql: str) -> None:
        writes = any(each in sql for each in (" main.", "BEGIN IMMEDIATE", "COMMIT"))
        inner = "spare" in sql or "volatile" in sql or (not self._connection.in_transaction and sql == "COMMIT")
        if (writes and not inner) or (self._reads and sql.startswith("SELECT") and "every_" in sql):
            self.left -= 1
            if self.left < 0 and not (sql == "COMMIT" and self.left < -1):
                error = (sqlite3.DatabaseError if self._code in ("CORRUPT", "NOTADB") else sqlite3.OperationalError)(
                    "no"
                )
                error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{self._code}")
                raise error


def converse(server: Running) -> list[Any]:
    """A conversation of two turns, whose second answer is right."""
    first = ask(server, [FACT])
    second = ask(server, [FACT, said(first), QUESTION])
    assert said(second)["content"] == ANSWER
    return [FACT, said(first), QUESTION, said(second), QUESTION]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "short"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_cache_that_cannot_be_written_is_computed_again(
    serve: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    server, calls = serve(session_dir=tmp_path), iter(range(1000))
    name = "write" if call == "short" else call
    real = getattr(os, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) < number:
            return real(*arguments, **options)
        if call == "short":
            return real(arguments[0], bytes(arguments[1][:4096]))
        raise OSError(errno.ENOSPC if number else errno.EIO, "no")

    class Os:
        def __getattr__(self, attribute: str) -> Any:
            return failing if attribute == name else getattr(os, attribute)

    with monkeypatch.context() as patched:
        patched.setattr(atomic_file, "os", Os())
        messages = converse(server)
        until(lambda: server.conversations.files.written + server.conversations.files.failed == 2)
    written = server.conversations.files.written
    assert bool(server.conversations.files.failed) == (call != "short")
    assert not damaged_files(server.conversations.store)
    other = serve(session_dir=tmp_path)
    third = ask(other, messages)
    assert said(third) == said(ask(server, messages))
    assert (cached(third) > 0) == bool(written)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_turn_that_the_disk_refuses_is_kept_in_memory_until_it_does_not(
    serve: Callable[..., Running], tmp_path: Path, code: str, after: int
) -> None:
    server = serve(session_dir=tmp_path)
    store = server.conversations.store
    connection = store._db
    store._db = Refusing(connection, code, after)  # type: ignore[assignment]
    messages = converse(server)
    assert store.spare_turns >= 1
    store._db = connection
    ask(server, messages)
    assert store.spare_turns == 0
    other = serve(session_dir=tmp_path)
    listed = other.client()._client.get(f"{other.url}/v1/sessions").json()["data"]
    assert [each["turns"] for each in listed] == [3]


def test_a_response_that_the_disk_refuses_is_there_after_a_restart(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    server = serve(session_dir=tmp_path)
    store = server.conversations.store
    connection = store._db
    store._db = Refusing(connection, "FULL", 0)  # type: ignore[assignment]
    first = server.client().responses.create(model="demo", input=[FACT], temperature=0)
    store._db = connection
    ask(server, [QUESTION])
    other = serve(session_dir=tmp_path)
    assert other.client().responses.retrieve(first.id).output_text == first.output_text


def test_an_object_that_only_memory_took_is_written_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    connection = store._db
    store._db = Refusing(connection, "FULL", 0)  # type: ignore[assignment]
    store.put_object("me", "one", {"number": 1})
    store.put_object("me", "two", {"number": 2})
    store._db = connection
    assert store.spare_turns == 2 and store.object("me", "one") == {"number": 1}
    store.put_object("me", "two", {"deleted": True})
    assert store.object("me", "two") == {"deleted": True}
    store.close()
    other = Store(tmp_path)
    assert other.object("me", "one") == {"number": 1} and other.object("me", "two") == {"deleted": True}
    other.close()


@pytest.mark.parametrize("code", ["IOERR", "CORRUPT"])
def test_a_database_that_cannot_be_read_costs_its_caches_only(
    serve: Callable[..., Running], tmp_path: Path, code: str
) -> None:
    server = serve(session_dir=tmp_path)
    first = server.client().responses.create(model="demo", input=[FACT], temperature=0)
    store = server.conversations.store
    store._db = Refusing(store._db, code, 0, reads=True)  # type: ignore[assignment]
    second = ask(server, [FACT, {"role": "assistant", "content": first.output_text}, QUESTION])
    assert said(second)["content"] == ANSWER and cached(second) == 0
    http = server.client()._client
    found = http.post(
        f"{server.url}/v1/responses", json={"model": "demo", "input": "x", "previous_response_id": first.id}
    )
    assert (found.status_code, found.json()["error"]["code"]) == (503, "storage_unavailable")


def test_a_refused_deletion_leaves_the_store_usable(tmp_path: Path) -> None:
    from tests.soak.kills import turn_of

    store = Store(tmp_path)
    path, session = turn_of(0, None)
    store.commit(path, session)
    connection = store._db
    store._db = Refusing(connection, "FULL", 2)  # type: ignore[assignment]
    with pytest.raises(sqlite3.OperationalError):
        store.remove_session(session.tenant, session.id)
    store._db = connection
    assert store.session(session.tenant, session.id) == session
    assert store.remove_session(session.tenant, session.id) == path.ids
    store.close()


def test_only_a_server_that_is_alone_clears_its_directory(serve: Callable[..., Running], tmp_path: Path) -> None:
    """The file of another server has no row yet, between the two steps of writing it."""
    serve(session_dir=tmp_path)
    begun = tmp_path / "anonymous" / ("0" * 32)
    begun.mkdir(parents=True)
    (begun / "gen-1-0.safetensors").write_bytes(b"x")
    second = serve(session_dir=tmp_path)
    assert (begun / "gen-1-0.safetensors").exists()
    second.stop()


def test_a_directory_is_left_when_its_server_ends(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(session_dir=tmp_path)
    held = SharedDirectory(tmp_path)
    assert not held.alone
    held.close()
    server.stop()
    held = SharedDirectory(tmp_path)
    assert held.alone
    held.share()
    beside = SharedDirectory(tmp_path)
    assert not beside.alone
    beside.close()
    held.close()


@pytest.mark.parametrize("column", ["messages", "answer", "figures", "output_tokens", "prompt_tokens"])
def test_a_damaged_turn_is_computed_from_the_request(
    serve: Callable[..., Running], tmp_path: Path, column: str
) -> None:
    server = serve(session_dir=tmp_path)
    first = ask(server, [FACT])
    until(lambda: server.conversations.files.written == 1)
    server.conversations.store._db.execute(f"UPDATE main.turns SET {column} = ?", (b"\xff[",))
    second = ask(server, [FACT, said(first), QUESTION])
    assert said(second)["content"] == ANSWER and cached(second) == 0
    assert server.client()._client.get(f"{server.url}/v1/sessions").status_code == 200
