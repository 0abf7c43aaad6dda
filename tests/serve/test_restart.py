"""Conversations outlive the server: what is committed goes on after kill -9, with its pairs from the files."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from loopserve.serve.kv_files import damaged_files
from loopserve.serve.store import Store
from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.processes import started
from tests.serve.test_chat_completions import ask, cached, said

ANSWER = "lisbon is amber falcon river ."

SEGFAULT = """
import ctypes, loopserve.serve.worker as worker
step = worker.Scheduler.step
def failing(self):
    if any(len(each.output) == 6 and each.max_new_tokens == 666 for each in self._running):
        ctypes.string_at(0)
    return step(self)
worker.Scheduler.step = failing
"""


def test_a_killed_server_goes_on_from_its_files(tmp_path: Path) -> None:
    with started(tmp_path) as (process, client):
        first = client.chat.completions.create(model="demo", messages=[FACT], temperature=0)
        until(lambda: list(tmp_path.glob("anonymous/*/gen-1-*.safetensors")))
        os.kill(process.pid, signal.SIGKILL)
    with started(tmp_path) as (_, client):
        messages = [FACT, said(first), QUESTION]
        second = client.chat.completions.create(model="demo", messages=messages, temperature=0)
        assert said(second)["content"] == ANSWER
        assert second.loopserve["session_id"] == first.loopserve["session_id"]


def test_a_crashed_process_is_replaced_and_a_stopped_one_finishes(tmp_path: Path) -> None:
    """A segmentation fault in mid-answer, then SIGTERM while one answer is written and another waits."""
    with started(tmp_path, ["--max-num-seqs", "1", "--shutdown-timeout", "600"], SEGFAULT) as (process, client):
        create = client.chat.completions.create
        first = create(model="demo", messages=[FACT], temperature=0)
        with pytest.raises(openai.APIConnectionError):
            create(model="demo", messages=[FACT], max_tokens=666, extra_body={"ignore_eos": True})
        messages = [FACT, said(first), QUESTION]
        assert said(create(model="demo", messages=messages, temperature=0))["content"] == ANSWER
        found: list[Any] = []
        long = {"model": "demo", "messages": messages, "extra_body": {"ignore_eos": True}, "max_tokens": 150}
        stream = iter(create(**long, stream=True))
        next(stream)
        waiting = threading.Thread(target=lambda: found.append(create(**long)))
        waiting.start()
        metrics = str(client.base_url).replace("/v1/", "/metrics")
        until(lambda: "num_requests_waiting 1.0" in client._client.get(metrics).text)
        process.terminate()
        assert list(stream)[-1].choices[0].finish_reason == "length"
        waiting.join()
        assert found[0].usage.completion_tokens == 150
        assert process.wait(60) == 0
    store = Store(tmp_path)
    turns = [turn for each in store.sessions() for turn in store.path(each.tenant, each.head).turns]
    assert {turn.answer["content"] for turn in turns} >= {said(first)["content"], ANSWER, said(found[0])["content"]}
    assert len(store.every_kv()) == 4 and not damaged_files(store)
    store.close()


def written(server: Running, directory: Path, count: int) -> list[Path]:
    until(lambda: server.conversations.files.written >= count)
    return sorted(directory.glob("anonymous/*/*.safetensors"))


def test_pairs_are_restored_from_files(serve: Callable[..., Running], tmp_path: Path) -> None:
    one = serve(session_dir=tmp_path)
    first = ask(one, [FACT])
    second = ask(one, [FACT, said(first), QUESTION])
    written(one, tmp_path, 2)
    other = serve(session_dir=tmp_path)
    third = ask(other, [FACT, said(first), QUESTION, said(second), QUESTION])
    assert cached(third) == second.usage.prompt_tokens + second.usage.completion_tokens - 1
    assert other.conversations.files.restored == 1
    assert said(third) == said(ask(one, [FACT, said(first), QUESTION, said(second), QUESTION]))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_removed_and_computed_again(
    serve: Callable[..., Running], tmp_path: Path, damage: str
) -> None:
    one = serve(session_dir=tmp_path)
    first = ask(one, [FACT])
    (file,) = written(one, tmp_path, 1)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 4
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-7])
    else:
        file.unlink()
    other = serve(session_dir=tmp_path)
    second = ask(other, [FACT, said(first), QUESTION])
    assert cached(second) == 0 and said(second)["content"] == ANSWER
    assert other.conversations.files.damaged == 1
    assert "loopserve:kv_files_damaged 1.0" in other.client()._client.get(f"{other.url}/metrics").text
    until(lambda: other.conversations.files.written == 1)
    held = [each.name for each in tmp_path.rglob("*.safetensors")]
    assert len(held) == 1 and held[0].startswith("gen-2")  # the damaged one is gone


def test_a_header_that_reads_the_same_bytes_otherwise_is_refused(serve: Callable[..., Running], tmp_path: Path) -> None:
    """Also in a file whose sha256 was compared before."""
    server = serve(session_dir=tmp_path)
    ask(server, [FACT])
    (file,) = written(server, tmp_path, 1)
    conversations = server.conversations
    (row,) = conversations.store.every_kv()
    path = conversations.store.path("anonymous", row.turn)
    assert path is not None and conversations.files.load(path, conversations.engine.stack) is not None
    data = file.read_bytes()
    assert data.count(b'"F32"') > 1
    file.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    assert conversations.files.load(path, conversations.engine.stack) is None
    assert conversations.files.damaged == 1
