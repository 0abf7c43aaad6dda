"""Limits by bytes on disk, in all and per key; requests per key; conversations that rest too long."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import openai
import pytest

from loopserve import Engine
from loopserve.serve.kv_files import damaged_files
from loopserve.serve.run import run_server
from loopserve.serve.settings import ServerSettings
from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, cached, said


def on_disk(directory: Path) -> dict[str, int]:
    """Bytes of cache files by tenant."""
    found: dict[str, int] = {}
    for each in directory.glob("*/*/*.safetensors"):
        tenant = each.parent.parent.name
        found[tenant] = found.get(tenant, 0) + each.stat().st_size
    return found


def fact(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"the code of oslo is {'is ' * number} ember ."}


def test_the_oldest_caches_are_removed_from_disk(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(session_dir=tmp_path, session_disk=400_000)
    first = ask(server, [FACT])
    for number in range(12):
        ask(server, [fact(number)])
        until(lambda number=number: server.conversations.files.written == number + 2)
        assert sum(on_disk(tmp_path).values()) <= 400_000
    files = server.conversations.files
    assert files.evicted and not damaged_files(server.conversations.store)
    other = serve(session_dir=tmp_path)
    again = ask(other, [FACT, said(first), QUESTION])
    assert cached(again) == 0 and said(again)["content"] == "lisbon is amber falcon river ."
    assert len(other.client()._client.get(f"{other.url}/v1/sessions").json()["data"]) == 13


def test_a_key_cannot_push_out_the_caches_of_another(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(session_dir=tmp_path, api_keys=("one", "two"), session_disk_per_key=300_000)
    create = server.client("one").chat.completions.create
    first = create(model="demo", messages=[FACT], temperature=0)
    for number in range(10):
        server.client("two").chat.completions.create(model="demo", messages=[fact(number)], temperature=0)
    until(lambda: server.conversations.files.written == 11)
    assert all(size <= 300_000 for size in on_disk(tmp_path).values()) and len(on_disk(tmp_path)) == 2
    other = serve(session_dir=tmp_path, api_keys=("one", "two"))
    create = other.client("one").chat.completions.create
    assert cached(create(model="demo", messages=[FACT, said(first), QUESTION], temperature=0)) > 0


def test_a_key_has_its_share_of_requests(serve: Callable[..., Running]) -> None:
    server = serve(api_keys=("one", "two"), max_requests_per_key=1)
    body = {"model": "demo", "messages": [FACT], "max_tokens": 4000, "ignore_eos": True}
    with server.connection("/v1/chat/completions", body, {"Authorization": "Bearer one"}):
        until(lambda: server.conversations.worker.scheduler.running)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client("one").chat.completions.create(model="demo", messages=[FACT])
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert server.client("two").chat.completions.create(model="demo", messages=[FACT]).choices
    until(lambda: not server.conversations.worker.admitted)
    assert server.client("one").chat.completions.create(model="demo", messages=[FACT]).choices


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_key_over_its_share_is_refused_for_it_though_the_server_is_full(
    serve: Callable[..., Running], path: str
) -> None:
    server = serve(api_keys=("one", "two"), max_requests_per_key=1, max_num_seqs=1, max_queued=0)
    worker = server.conversations.worker
    http = server.client("one")._client
    tenants: list[str] = []
    admit, worker.admit = worker.admit, lambda answers, tenant: (tenants.append(tenant), admit(answers, tenant))[1]  # type: ignore[method-assign]
    assert server.client("one").chat.completions.create(model="demo", messages=[FACT], max_tokens=1).choices
    until(lambda: not worker.admitted)
    admit(1, tenants[0])
    status = [
        http.post(f"{server.url}/v1/{path}", content=b"{", headers={"Authorization": f"Bearer {key}"}).status_code
        for key in ("one", "two")
    ]
    worker.leave(1, tenants[0])
    assert status == [429, 503]


@pytest.mark.parametrize("limits", [{"max_requests_per_key": 2}, {"max_num_seqs": 1, "max_queued": 1}])
def test_more_answers_than_are_ever_let_in_are_no_matter_of_waiting(
    serve: Callable[..., Running], limits: dict[str, int]
) -> None:
    client = serve(**limits).client()
    with pytest.raises(openai.BadRequestError, match="n: at most 2") as caught:
        client.chat.completions.create(model="demo", messages=[FACT], n=3)
    assert caught.value.param == "n" and "retry-after" not in caught.value.response.headers
    assert client.chat.completions.create(model="demo", messages=[FACT]).choices


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_overload_is_refused_before_anything_is_done_for_a_request(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    server = serve(api_keys=("one",), max_num_seqs=1, max_queued=0)
    monkeypatch.setattr(server.app, "router", None)  # no route is looked for
    worker, http = server.conversations.worker, server.client("one")._client
    worker.admit(1, "somebody")
    found = http.post(f"{server.url}/v1/{path}", content=b"{", headers={"Authorization": "Bearer one"})
    assert found.status_code == 503 and found.json()["error"]["code"] == "server_overloaded"
    assert int(found.headers["retry-after"]) >= 1 and worker.rejected == 1
    assert http.post(f"{server.url}/v1/{path}", content=b"{").status_code == 401
    worker.leave(1, "somebody")


def test_answers_whose_pairs_never_fit_the_memory_are_no_matter_of_waiting(serve: Callable[..., Running]) -> None:
    client = serve(kv_cache_memory=5 << 20).client()
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="n: 16 answers to one request may need") as caught:
            client.chat.completions.create(model="demo", messages=[FACT], n=16, max_tokens=8, stream=stream)
        assert caught.value.param == "n" and "retry-after" not in caught.value.response.headers
    assert len(client.chat.completions.create(model="demo", messages=[FACT], n=2, max_tokens=8).choices) == 2


def test_what_is_there_at_the_start_is_left_out_of_garbage_collections(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []

    def run(serving: Coroutine[Any, Any, None]) -> None:
        serving.close()
        frozen.append(gc.get_freeze_count())

    monkeypatch.setattr(asyncio, "run", run)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assert run_server(engine, ServerSettings("demo"), {}, listener) == 0
        assert frozen[0] > 10_000
    finally:
        gc.unfreeze()


def test_conversations_that_rest_too_long_are_forgotten(serve: Callable[..., Running], tmp_path: Path) -> None:
    server = serve(session_dir=tmp_path, session_ttl_s=1e-6)
    ask(server, [FACT])
    until(lambda: server.conversations.files.written == 1)
    removed = asyncio.run_coroutine_threadsafe(server.server.sessions.expire(), server.loop).result(30)
    assert removed == 1 and not on_disk(tmp_path)
    assert server.client()._client.get(f"{server.url}/v1/sessions").json()["data"] == []


def test_a_conversation_with_an_answer_under_way_is_not_forgotten(serve: Callable[..., Running]) -> None:
    server = serve(session_ttl_s=1e-6)
    first = ask(server, [FACT])
    body = {"model": "demo", "messages": [FACT, said(first), QUESTION], "max_tokens": 4000, "ignore_eos": True}

    def expire() -> int:
        return asyncio.run_coroutine_threadsafe(server.server.sessions.expire(), server.loop).result(30)

    with server.connection("/v1/chat/completions", body):
        until(lambda: server.conversations.worker.scheduler.running)
        assert expire() == 0
    until(lambda: not server.conversations.worker.admitted)
    assert expire() == 1
