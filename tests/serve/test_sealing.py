"""A session directory with a key: nothing of a conversation can be read in it, and nothing in it can be changed or moved."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography")

from loopserve.cli import main
from loopserve.core.errors import ConfigError
from loopserve.serve.sealing import Sealer, read_key
from loopserve.serve.store import Store
from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, cached, said

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
ANSWER = "lisbon is amber falcon river ."


def converse(server: Running) -> list[Any]:
    first = ask(server, [FACT], extra_headers={"x-session-id": "my lisbon session"})
    kept = server.client().responses.create(model="demo", input=[FACT], temperature=0)
    assert kept.output_text
    messages = [FACT, said(first), QUESTION]
    assert said(ask(server, messages))["content"] == ANSWER
    until(lambda: server.conversations.files.written == 3)
    return messages


def test_a_conversation_goes_on_after_a_restart(serve: Callable[..., Running], tmp_path: Path) -> None:
    messages = converse(serve(session_dir=tmp_path, session_key=KEY))
    other = serve(session_dir=tmp_path, session_key=KEY)
    again = ask(other, [*messages, {"role": "assistant", "content": ANSWER}, QUESTION])
    assert cached(again) > 0 and other.conversations.files.restored == 1 and not other.conversations.files.damaged
    (newest, *_) = other.client()._client.get(f"{other.url}/v1/sessions").json()["data"]
    assert newest["title"] == FACT["content"] and newest["turns"] == 3


def test_nothing_can_be_read_in_the_directory(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(session_dir=tmp_path, session_key=KEY)
    converse(server)
    tokens = server.conversations.engine.tokenizer.prompt([FACT]).tokens
    digest = server.conversations.store.find("anonymous", server.conversations.model, [])
    assert digest == []
    server.stop()
    held = b"".join(each.read_bytes() for each in tmp_path.rglob("*") if each.is_file())
    for text in (b"lisbon", b"amber", b"my lisbon session", b'"role"', b"keys.0", b'"dtype"'):
        assert text not in held
    from loopserve.serve.records import pack_tokens

    assert pack_tokens(tokens) not in held


@pytest.mark.parametrize("key", [None, OTHER])
def test_another_key_or_none_is_refused(serve: Callable[..., Running], tmp_path: Path, key: bytes | None) -> None:
    serve(session_dir=tmp_path, session_key=KEY)
    with pytest.raises(ConfigError, match="session-key-file"):
        Store(tmp_path, Sealer(key))


def test_a_directory_without_a_key_does_not_get_one(serve: Callable[..., Running], tmp_path: Path) -> None:
    ask(serve(session_dir=tmp_path), [FACT])
    with pytest.raises(ConfigError, match="begun without a key"):
        Store(tmp_path, Sealer(KEY))


def test_values_do_not_open_elsewhere_or_changed() -> None:
    sealer = Sealer(KEY)
    sealed = sealer.seal(b"text", "a place")
    assert sealer.open(sealed, "a place") == b"text" and sealed != sealer.seal(b"text", "a place")
    for changed, place in (
        (sealed, "another"),
        (sealed[:-1], "a place"),
        (b"", "a place"),
        (sealed[:5] + b"x" + sealed[6:], "a place"),
    ):
        with pytest.raises(ValueError, match="does not open"):
            sealer.open(changed, place)
    with pytest.raises(ValueError, match="does not open"):
        Sealer(OTHER).open(sealed, "a place")
    with pytest.raises(ValueError, match="not sealed"):
        sealer.open_text("text", "a place")


def test_the_files_of_two_turns_cannot_be_exchanged(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(session_dir=tmp_path, session_key=KEY)
    messages = converse(server)
    store = server.conversations.store
    one, two, *_ = store.every_kv()
    data = (tmp_path / one.file).read_bytes()
    (tmp_path / two.file).write_bytes(data)
    store.put_kv(two.turn, two.file, one.bytes, one.sha256, one.manifest)
    other = serve(session_dir=tmp_path, session_key=KEY)
    assert said(ask(other, [*messages, {"role": "assistant", "content": ANSWER}, QUESTION]))["content"] == ANSWER


@pytest.mark.parametrize("column", ["tenant", "session", "parent", "model", "stack"])
def test_a_turn_does_not_open_for_another_tenant_or_elsewhere_in_the_tree(
    serve: Callable[..., Running], tmp_path: Path, column: str
) -> None:
    server = serve(session_dir=tmp_path, session_key=KEY)
    converse(server)
    store = server.conversations.store
    (head,) = [each.head for each in store.sessions() if each.key == "my lisbon session"]
    assert head is not None and store.turn("anonymous", head) is not None
    store._db.execute(f"UPDATE main.turns SET {column} = 'other' WHERE id=?", (head,))
    assert store.turn("other" if column == "tenant" else "anonymous", head) is None


def test_responses_names_and_manifests_do_not_open_for_another_tenant(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    server = serve(session_dir=tmp_path, session_key=KEY)
    converse(server)
    store = server.conversations.store
    (name,) = [each[0] for each in store._db.execute("SELECT id FROM main.objects WHERE tenant <> ''")]
    assert store.object("anonymous", name) is not None
    store._db.execute("UPDATE main.objects SET tenant = 'other'")
    store._db.execute("UPDATE main.sessions SET tenant = 'other'")
    store._db.execute("UPDATE main.kv SET file = replace(file, 'anonymous/', 'other/')")
    assert store.object("other", name) is None
    assert {each.key for each in store.sessions("other")} == {None}
    assert store.every_kv() == [] and len(store.damaged_kv()) == 3


def test_keys_are_read_in_three_forms(tmp_path: Path) -> None:
    import base64

    key, file = secrets.token_bytes(32), tmp_path / "key"
    for data in (key, key.hex().encode() + b"\n", base64.b64encode(key)):
        file.write_bytes(data)
        assert read_key(file) == key
    for data in (b"", b"secret", key[:-1], b"z" * 64):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match="openssl rand"):
            read_key(file)
    file.write_bytes(secrets.token_hex(16).encode())  # 32 bytes as well, but half of them are no secret
    with pytest.raises(ConfigError, match="32 hex digits, which are 16 bytes"):
        read_key(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "nothing")


def test_the_command_line_shows_sessions_with_the_key(
    serve: Callable[..., Running], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(session_dir=tmp_path / "sessions", session_key=KEY)
    converse(server)
    (tmp_path / "key").write_text(KEY.hex())

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(["sessions", *arguments, "--session-dir", str(tmp_path / "sessions")])
        return int(ended.value.code or 0)

    assert run("ls", "--json", "--session-key-file", str(tmp_path / "key")) == 0
    assert any(each["key"] == "my lisbon session" for each in json.loads(capsys.readouterr().out))
    assert run("verify", "--session-key-file", str(tmp_path / "key")) == 0
    assert "3 files, 0 damaged" in capsys.readouterr().out
    assert run("ls") == 2
    assert "it is encrypted" in capsys.readouterr().err
