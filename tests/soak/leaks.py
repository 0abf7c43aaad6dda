"""R14: after many requests of every kind, cancelled and bad ones and faults of policies among them, nothing has piled up."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from loopserve import load_stack
from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, said
from tests.soak.cases import Cases, demo_engine, running

EVERY = 100  # requests between two looks at the memory
MOST_SLOPE_MIB = 1.0  # per 1,000 requests
ANSWER = "lisbon is amber falcon river ."


def run(cases: int, seed: int = 0) -> Cases:
    found, draw, memory = Cases(), random.Random(seed), []
    stacks = {"snapkv": load_stack("snapkv"), "quest": load_stack("quest")}
    limits: dict[str, Any] = {"kv_cache_memory": 48 << 20, "session_ttl_s": 60.0, "max_num_seqs": 4}
    with tempfile.TemporaryDirectory() as folder, running(session_dir=Path(folder), stacks=stacks, **limits) as server:
        for _ in range(20):
            _request(server, draw)
        before = _counts(server)
        for number in range(cases):
            if number % EVERY == 0:
                memory.append((number, _resident()))
            with found.case(f"request {number}"):
                _request(server, draw)
        with found.case("counts are back"):
            until(lambda: _counts(server) == before, 30)
        held = server.conversations.live.allocated_bytes
        with found.case("the limit on memory is kept"):
            assert held <= limits["kv_cache_memory"]
    late = memory[len(memory) // 4 :]  # allocators have settled by then
    if len(late) > 8:
        slope = _slope(late) * 1000 / 2**20
        found.figures = {"memory_slope_mib_per_1000": slope, "resident_mib": late[-1][1] / 2**20}
        if slope >= MOST_SLOPE_MIB:
            found.failures.append(f"memory grows by {slope:.2f} MiB per 1,000 requests")
    return found


def _request(server: Running, draw: random.Random) -> None:
    kind = draw.random()
    stack = draw.choice([None, None, "snapkv", "quest"])
    extra = {} if stack is None else {"loopserve": {"stack": stack}}
    if kind < 0.2:
        body = {
            "model": "demo",
            "messages": [FACT],
            "ignore_eos": True,
            "max_tokens": 500,
            "stream": draw.random() < 0.5,
        }
        with server.connection("/v1/chat/completions", body):
            if draw.random() < 0.7:
                until(lambda: server.conversations.worker.admitted)
    elif kind < 0.25:
        found = server.client()._client.post(
            f"{server.url}/v1/chat/completions", json={"model": "demo", "messages": draw.choice([[], 3])}
        )
        assert found.status_code == 400
    elif kind < 0.27:
        _with_fault(server, draw)
    else:
        city = draw.choice(("lisbon", "oslo"))
        text = FACT["content"].replace("lisbon", city)
        first = ask(server, [{"role": "user", "content": text}], extra_body=extra)
        question = QUESTION["content"].replace("lisbon", city)
        more = [{"role": "user", "content": text}, said(first), {"role": "user", "content": question}]
        assert said(ask(server, more, extra_body=extra))["content"] == ANSWER.replace("lisbon", city)


def _with_fault(server: Running, draw: random.Random) -> None:
    """Let every policy of the engine's stack fail in one answer, which is dense then."""
    slots = demo_engine().token_engine.slots
    policies = list(slots.compressors.values())
    real = [type(each).after_forward for each in policies]

    def failing(*_: object) -> None:
        raise ValueError("a fault of a plugin")

    for each in policies:
        type(each).after_forward = failing  # type: ignore[method-assign]
    try:
        reply = ask(server, [FACT])
        assert reply.choices[0].message.content == "ok ."
    finally:
        for each, kept in zip(policies, real, strict=True):
            type(each).after_forward = kept  # type: ignore[method-assign]


def _counts(server: Running) -> dict[str, int]:
    """Return what must be the same whenever the server is idle: descriptors, threads' work, requests, tasks of its loop."""
    conversations = server.conversations
    loop = asyncio.run_coroutine_threadsafe(_tasks(), server.loop)
    until(lambda: not conversations.worker.admitted and not conversations._writing)
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "tasks": loop.result(10),
        "running": conversations.worker.scheduler.running + conversations.worker.scheduler.waiting,
        "reserved": len(conversations.worker.scheduler.ledger._reserved),
        "busy": sum(each.busy for each in conversations.engine.token_engine.sessions),
        "responses": len(server.server.running),
    }


async def _tasks() -> int:
    return len(asyncio.all_tasks())


def _resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _slope(points: list[tuple[int, int]]) -> float:
    """Return bytes per request by least squares."""
    n, mean = len(points), sum(y for _, y in points) / len(points)
    middle = sum(x for x, _ in points) / n
    return sum((x - middle) * (y - mean) for x, y in points) / sum((x - middle) ** 2 for x, _ in points)
