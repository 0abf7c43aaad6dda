"""R1: no input gives a 5xx, a traceback or an endless answer: requests drawn from the server's own OpenAPI document."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from tests.models.test_chat import CHATML
from tests.serve.bytes_engine import bytes_engine
from tests.serve.conftest import Running
from tests.soak.cases import Cases, percentile, running

LIMIT_S = 20.0
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
HELLO = [{"role": "user", "content": "hello"}]
KNOWN: dict[str, Any] = {"model": "demo", "messages": HELLO, "input": "hello", "prompt": "hello"}


def run(cases: int, seed: int = 0) -> Cases:
    found, seconds, statuses = Cases(), [], {}
    with running(bytes_engine(CHATML), default_max_tokens=8) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [each.ok() for each in schema.get_all_operations()]
        posts = [each for each in operations if each.method.lower() == "post"]
        share = cases // (2 * (len(operations) + 3 * len(posts))) + 1  # bodies are where most can go wrong
        rounds = 0
        while found.count < cases and rounds < 4:  # some operations have nothing that could be wrong
            for number, operation in enumerate(operations):
                for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
                    count = max(1, share * (4 if operation in posts else 1) // 2)
                    drawn = seed + number + 1000 * rounds
                    _draw(server, operation, mode, count, drawn, found, seconds, statuses)
            rounds += 1
        with found.case("the server goes on"):
            assert server.client().chat.completions.create(model="demo", messages=HELLO, max_tokens=2).choices
        with found.case("everything is free"):
            assert not server.conversations.worker.admitted
    found.figures = {
        "slowest_s": max(seconds),
        "p99_s": percentile(seconds, 0.99),
        "statuses": dict(sorted(statuses.items())),
    }
    return found


def _draw(
    server: Running,
    operation: Any,
    mode: Any,
    count: int,
    seed: int,
    found: Cases,
    seconds: list[float],
    statuses: dict[str, int],
) -> None:
    draw = random.Random(seed)
    try:
        strategy = operation.as_strategy(generation_mode=mode)
    except Exception as error:  # an operation without parameters has no wrong ones
        if "negat" not in str(error).lower():
            raise
        return

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def send(data: Any) -> None:
        try:
            case = data.draw(strategy)
        except schemathesis.errors.SchemathesisError:
            return
        _make_deeper(case, draw)
        with found.case(f"{operation.method} {operation.path} {mode}: {_shown(case)}"):
            begun = time.perf_counter()
            response = case.call(timeout=LIMIT_S)
            seconds.append(time.perf_counter() - begun)
            assert seconds[-1] < LIMIT_S / 2, f"it took {seconds[-1]} seconds"
            statuses[str(response.status_code)] = statuses.get(str(response.status_code), 0) + 1
            assert response.status_code < 500 or "server_overloaded" in response.text, response.text
            assert "Traceback" not in response.text and 'data: {"error"' not in response.text
            if response.status_code >= 400:
                error = json.loads(response.text)["error"]
                assert error.keys() == {"message", "type", "param", "code"} and error["message"]

    try:
        send()
    except Exception as error:
        if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
            raise


def _make_deeper(case: Any, draw: random.Random) -> None:
    """Make a part of the bodies valid where random ones hardly ever are, and answers short."""
    body = case.body
    if not isinstance(body, dict):
        return
    for name, value in KNOWN.items():
        if name in body and draw.random() < (0.9 if name == "model" else 0.5):
            body[name] = value
    for name in LIMITS:
        if isinstance(body.get(name), int) and 8 < body[name] < 10_000:
            body[name] = 8
    for name in ("previous_response_id", "conversation", "loopserve", "tools", "response_format", "text"):
        if draw.random() < 0.5:
            body.pop(name, None)


def _shown(case: Any) -> str:
    return f"{case.path_parameters} {case.query} {case.body!r}"[:1500]
