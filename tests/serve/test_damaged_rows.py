"""A damaged row of the database costs its cache, its response or its name, and never a request, a start or the other sessions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loopserve.cli import main
from loopserve.serve.kv_files import damaged_files, remove_orphans
from loopserve.serve.store import Store
from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, cached, said

ANSWER = "lisbon is amber falcon river ."
TENANT = "anonymous"
MANIFESTS = ['{"start": 0, "e', "[]", "{}", "null", b"\xff\xfe", '{"start": "0"}']


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_damaged_manifest_is_no_cache(
    serve: Callable[..., Running], tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: str | bytes
) -> None:
    server = serve(session_dir=tmp_path)
    first = ask(server, [FACT])
    until(lambda: server.conversations.files.written == 1)
    store = server.conversations.store
    store._db.execute("UPDATE main.kv SET manifest = CAST(? AS TEXT)", (manifest,))
    with pytest.raises(SystemExit) as ended:
        main(["sessions", "verify", "--session-dir", str(tmp_path)])
    assert ended.value.code == 1 and "1 files, 1 damaged" in capsys.readouterr().out
    server.conversations.live.close()
    second = ask(server, [FACT, said(first), QUESTION])
    assert said(second)["content"] == ANSWER and cached(second) == 0
    until(lambda: server.conversations.files.written == 2)
    store._db.execute("UPDATE main.kv SET manifest = CAST(? AS TEXT)", (manifest,))
    server.stop()
    other = serve(session_dir=tmp_path)
    assert not list(tmp_path.glob("*/*/*.safetensors"))  # no row names them any more
    again = ask(other, [FACT, said(first), QUESTION, said(second), QUESTION])
    assert said(again)["content"] == ANSWER and cached(again) == 0


@pytest.mark.parametrize("file", ["x", "../../x", "/etc/x/y", b"\xff"])
def test_a_row_whose_file_is_elsewhere_is_damaged(serve: Callable[..., Running], tmp_path: Path, file: str) -> None:
    server = serve(session_dir=tmp_path, session_disk=10**9)
    first = ask(server, [FACT])
    until(lambda: server.conversations.files.written == 1)
    store = server.conversations.store
    store._db.execute("UPDATE main.kv SET file = CAST(? AS TEXT)", (file,))
    assert store.kv_sizes() == [] and len(damaged_files(store)) == 1
    assert said(ask(server, [FACT, said(first), QUESTION]))["content"] == ANSWER
    until(lambda: server.conversations.files.written == 2)
    remove_orphans(store)
    assert not damaged_files(store) and len(store.every_kv()) == 1


@pytest.mark.parametrize("key", ["CAST(x'ff' AS TEXT)", "x'ff'"])
def test_a_damaged_name_of_a_session_keeps_the_others(serve: Callable[..., Running], tmp_path: Path, key: str) -> None:
    server = serve(session_dir=tmp_path)
    ask(server, [FACT], extra_headers={"x-session-id": "one"})
    ask(server, [FACT], extra_headers={"x-session-id": "two"})
    store = server.conversations.store
    store._db.execute(f"UPDATE main.sessions SET key = {key} WHERE key = 'one'")
    found = server.client()._client.get(f"{server.url}/v1/sessions")
    assert {each["key"] for each in found.json()["data"]} == {None, "two"}
    assert len(store.expired(-60.0)) == 2
    assert said(ask(server, [FACT], extra_headers={"x-session-id": "one"}))["content"] == "ok ."


def test_a_damaged_sealed_name_keeps_no_session_from_expiring(serve: Callable[..., Running], tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    server = serve(session_dir=tmp_path, session_key=bytes(range(32)))
    ask(server, [FACT], extra_headers={"x-session-id": "one"})
    ask(server, [FACT], extra_headers={"x-session-id": "two"})
    store = server.conversations.store
    store._db.execute("UPDATE main.sessions SET key = x'00' WHERE id = (SELECT min(id) FROM main.sessions)")
    assert [each.key for each in store.expired(-60.0)].count(None) == 1
    assert len(store.expired(-60.0)) == len(store.sessions(TENANT)) == 2


@pytest.mark.parametrize("body", ['{"resp', "[]", b"\xff"])
def test_a_damaged_response_is_not_there(serve: Callable[..., Running], tmp_path: Path, body: str | bytes) -> None:
    server = serve(session_dir=tmp_path)
    first = server.client().responses.create(model="demo", input=[FACT], temperature=0)
    server.conversations.store._db.execute("UPDATE main.objects SET body = CAST(? AS TEXT)", (body,))
    http = server.client()._client
    assert http.get(f"{server.url}/v1/responses/{first.id}").status_code == 404
    second = server.client().responses.create(
        model="demo", input=[QUESTION], temperature=0, previous_response_id=first.id
    )
    assert second.output_text == ANSWER


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("messages", "5"),
        ("messages", '["x"]'),
        ("messages", "[{}]"),
        ("answer", "[]"),
        ("answer", "{}"),
        ("figures", "1"),
        ("output_tokens", "abcd"),
        ("messages", b"\xff"),
    ],
)
def test_a_turn_of_another_form_is_computed_from_the_request(
    serve: Callable[..., Running], tmp_path: Path, column: str, value: str | bytes
) -> None:
    server = serve(session_dir=tmp_path)
    first = ask(server, [FACT])
    until(lambda: server.conversations.files.written == 1)
    server.conversations.store._db.execute(f"UPDATE main.turns SET {column} = CAST(? AS TEXT)", (value,))
    second = ask(server, [FACT, said(first), QUESTION])
    assert said(second)["content"] == ANSWER and cached(second) == 0
    assert server.client()._client.get(f"{server.url}/v1/sessions").status_code == 200


@pytest.mark.parametrize("column", ["prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("bit", [0, 30])
def test_a_flipped_bit_of_a_token_is_computed_from_the_request(
    serve: Callable[..., Running], tmp_path: Path, column: str, bit: int
) -> None:
    """Another token answers wrongly; one that the model does not have fails in every pass."""
    server = serve(session_dir=tmp_path)
    first = ask(server, [FACT])
    until(lambda: server.conversations.files.written == 1)
    store = server.conversations.store
    ((data,),) = store._db.execute(f"SELECT {column} FROM main.turns").fetchall()
    changed = (int.from_bytes(data, "little") ^ 1 << bit).to_bytes(len(data), "little")
    store._db.execute(f"UPDATE main.turns SET {column} = ?", (changed,))
    second = ask(server, [FACT, said(first), QUESTION])
    assert said(second)["content"] == ANSWER and cached(second) == 0


def test_a_manifest_is_read_back_as_it_was_written(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(session_dir=tmp_path)
    ask(server, [FACT])
    until(lambda: server.conversations.files.written == 1)
    (row,) = server.conversations.store.every_kv()
    other = Store(tmp_path)
    assert other.kv(row.turn) == row
    assert json.loads(json.dumps(row.manifest)) == row.manifest
    other.close()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_turn_that_comes_before_itself_is_computed_from_the_request(
    serve: Callable[..., Running], tmp_path: Path, length: int
) -> None:
    server = serve(session_dir=tmp_path)
    talk = [FACT, said(ask(server, [FACT]))]
    for _ in range(2):
        talk += [QUESTION, said(ask(server, [*talk, QUESTION]))]
    other = {"role": "user", "content": FACT["content"].replace("lisbon", "oslo")}
    kept = ask(server, [other])
    store = server.conversations.store
    (session,) = [each for each in store.sessions(TENANT) if store.path(TENANT, str(each.head)).messages[0] == FACT]
    turns = store.path(TENANT, str(session.head)).ids
    store._db.execute("UPDATE main.turns SET parent = ? WHERE id = ?", (turns[length - 1], turns[0]))

    assert store.path(TENANT, turns[-1]) is None and store.title(TENANT, turns[-1])[1] == 3
    http, at = server.client()._client, f"{server.url}/v1/sessions"
    assert len(http.get(at).json()["data"]) == 2 and http.get(f"{at}/{session.id}").json()["turns"] == []
    again = ask(server, [*talk, QUESTION])
    assert cached(again) == 0 and again.choices[0].message.content
    more = ask(server, [other, said(kept), {"role": "user", "content": QUESTION["content"].replace("lisbon", "oslo")}])
    assert cached(more) > 0 and said(more)["content"] == ANSWER.replace("lisbon", "oslo")
    assert http.delete(f"{at}/{session.id}").json()["deleted"]
    assert not {row[0] for row in store._db.execute("SELECT id FROM every_turns")} & set(turns)
    assert len(http.get(at).json()["data"]) == 2  # the one begun anew, and the other
