"""R3: clients leave at random points; what they held is free soon, and the session is at its last complete turn."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from contextlib import ExitStack
from typing import Any

from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask, cached, said
from tests.soak.cases import Cases, percentile, running

POINTS = ("head", "body", "queued", "prefilling", "decoding", "first byte", "stream")
CHAT, RESPONSES, TEXT = "/v1/chat/completions", "/v1/responses", "/v1/completions"
ANSWER = "lisbon is amber falcon river ."


def run(cases: int, seed: int = 0) -> Cases:
    found, draw, freed = Cases(), random.Random(seed), []
    with running(max_num_seqs=2, max_queued=8) as server:
        first = ask(server, [FACT])
        held = first.usage.total_tokens
        for number in range(cases):
            point = POINTS[number % len(POINTS)]
            with found.case(f"{number} {point}"):
                freed.append(_leave(server, point, draw, [FACT, said(first), QUESTION]))
                _at_rest(server)
                if number % 4 == 0:
                    second = ask(server, [FACT, said(first), QUESTION])
                    assert said(second)["content"] == ANSWER
                    assert cached(second) == held - 1, "the conversation was computed anew"
    found.figures = {
        "freed_p50_s": percentile(freed, 0.5),
        "freed_p99_s": percentile(freed, 0.99),
        "freed_max_s": max(freed),
    }
    return found


def _leave(server: Running, point: str, draw: random.Random, messages: list[Any]) -> float:
    """Send a request, leave at a point, and return the seconds until nothing of it is under way."""
    path, stream = draw.choice((CHAT, RESPONSES, TEXT)), draw.random() < 0.5 or point in ("first byte", "stream")
    body: dict[str, Any] = {"model": "demo", "stream": stream, "ignore_eos": True, "temperature": 0}
    text = "is " * draw.randrange(4000, 6000) if point == "prefilling" else "the code of oslo is ember ."
    if path == CHAT:
        body |= {
            "messages": messages
            if draw.random() < 0.5 and point != "prefilling"
            else [{"role": "user", "content": text}]
        }
    elif path == RESPONSES:
        body |= {"input": text}
    else:
        body |= {"prompt": text}
    body["max_output_tokens" if path == RESPONSES else "max_tokens"] = 1500
    scheduler = server.conversations.worker.scheduler
    with ExitStack() as others:
        if point == "queued":
            for _ in range(2):
                others.enter_context(server.connection(path, body))
            until(lambda: scheduler.running == 2)
        connection = _sent(server, path, json.dumps(body).encode(), point, draw)
        _wait_for(server, connection, point, draw)
        if draw.random() < 0.5:  # a reset in place of an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        left = time.perf_counter()
        if point == "queued":
            until(lambda: scheduler.waiting == 0)
    until(lambda: not scheduler.running and not scheduler.waiting and not server.conversations.worker.admitted)
    return time.perf_counter() - left


def _sent(server: Running, path: str, data: bytes, point: str, draw: random.Random) -> socket.socket:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    whole = head.encode() + data
    size = {"head": draw.randrange(1, len(head)), "body": draw.randrange(len(head), len(whole))}.get(point, len(whole))
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(whole[:size])
    return connection


def _wait_for(server: Running, connection: socket.socket, point: str, draw: random.Random) -> None:
    scheduler = server.conversations.worker.scheduler

    def output() -> int:
        return max((len(each.output) for each in list(scheduler._running)), default=0)

    if point == "queued":
        until(lambda: scheduler.waiting == 1)
    elif point == "prefilling":
        until(lambda: scheduler.running)
    elif point == "decoding":
        wanted = draw.randrange(1, 40)
        until(lambda: output() >= wanted)
    elif point == "first byte":
        connection.recv(1)
    elif point == "stream":
        left = draw.randrange(1, 6000)
        while left > 0:
            left -= len(connection.recv(min(left, 1024)))


def _at_rest(server: Running) -> None:
    """Nothing is reserved, and no session is in the midst of a turn."""
    worker = server.conversations.worker
    busy, reserved = worker.call(
        lambda: (
            [each for each in server.conversations.engine.token_engine.sessions if each.busy],
            dict(worker.scheduler.ledger._reserved),
        )
    ).result(30)
    assert not busy and not reserved
    assert worker.admitted == 0
