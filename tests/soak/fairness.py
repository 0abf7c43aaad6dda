"""R15: short messages beside a prompt of 8,000 tokens: they do not wait for it."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

from tests.serve.conftest import FACT, Running, until
from tests.serve.processes import started
from tests.soak.cases import Cases, percentile, running

LONG, SHORT = 8000, 20


def run(cases: int, seed: int = 0, *, apart: bool = False, tokens: int = 512) -> Cases:
    """Begin a long prompt and ``SHORT`` short ones, ``cases`` times. Without ``apart``, the order of the answers is looked at alone."""
    options = ["--max-num-batched-tokens", str(tokens)]
    if not apart:
        return _order(cases)
    found = Cases()
    with tempfile.TemporaryDirectory() as folder, started(Path(folder), options) as (_, client):
        url = str(client.base_url).removesuffix("/v1/")
        alone, beside = asyncio.run(_measure(url, cases))
    found.count = len(beside)
    ratio = percentile(beside, 0.99) / percentile(alone, 0.99)
    if ratio > 3:
        found.failures.append(f"p99 of the time to first token is {ratio:.2f} times that of an idle server")
    found.figures = {
        "ttft_p99_alone_s": percentile(alone, 0.99),
        "ttft_p99_beside_s": percentile(beside, 0.99),
        "ttft_p50_alone_s": percentile(alone, 0.5),
        "ttft_p50_beside_s": percentile(beside, 0.5),
        "ratio_p99": ratio,
    }
    return found


async def _measure(url: str, rounds: int) -> tuple[list[float], list[float]]:
    """Return the times to first token of short messages, one after another: on an idle server, and beside a long prompt."""
    alone, beside = [], []
    async with httpx2.AsyncClient(timeout=600) as client:
        await _first_token(client, url, FACT["content"])
        for number in range(rounds):
            alone += [await _first_token(client, url, FACT["content"]) for _ in range(SHORT)]
            long = asyncio.create_task(_first_token(client, url, f"{number} " + "is " * LONG))
            await asyncio.sleep(0.2)
            while not long.done() and len(beside) < (number + 1) * SHORT:
                beside.append(await _first_token(client, url, FACT["content"]))
            await long
    return alone, beside


async def _first_token(client: httpx2.AsyncClient, url: str, text: str) -> float:
    """Return the seconds until a message's first chunk with text."""
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 4,
        "stream": True,
    }
    sent = time.perf_counter()
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if ('"content"' in line and '"role"' not in line) or "[DONE]" in line:  # an answer may have no text
                return time.perf_counter() - sent
    raise AssertionError("the stream ended early")


def _order(cases: int) -> Cases:
    found = Cases()
    with running(max_num_seqs=32) as server:
        for number in range(cases):
            with found.case(f"round {number}"):
                order = _answered(server)
                assert order[-1] == "long", (
                    f"the long prompt came before {len(order) - order.index('long') - 1} short ones"
                )
    return found


def _answered(server: Running) -> list[str]:
    """Queue a long prompt and short ones behind it while the model is held up; return in which order they were answered."""
    order: list[str] = []
    scheduler = server.conversations.worker.scheduler
    scheduler.step = lambda: time.sleep(0.001) or True  # type: ignore[method-assign,func-returns-value]

    def send(name: str, text: str) -> None:
        messages: Any = [{"role": "user", "content": text}]
        server.client().chat.completions.create(model="demo", messages=messages, max_tokens=4, temperature=0)
        order.append(name)

    threads = [threading.Thread(target=send, args=("long", "is " * LONG))]
    threads += [threading.Thread(target=send, args=("short", FACT["content"])) for _ in range(SHORT)]
    server.client()
    for number, each in enumerate(threads):
        each.start()
        until(lambda number=number: scheduler.waiting > number)
    del scheduler.step
    for each in threads:
        each.join()
    return order
