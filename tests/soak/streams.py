"""R17: streams are well-formed, and join to the whole answer: emoji and CJK over token borders, stop strings over chunks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

from tests.models.test_chat import CHATML
from tests.serve.bytes_engine import Dictated, bytes_engine
from tests.serve.conftest import Running
from tests.soak.cases import Cases, running

PARTS = ["a", "b ", "\n", "\n\n", "data: ", "[DONE]", ": x", '"', "\\", "\u2028", "\r\n", "é", "e\u0301", "ß", "漢", "字", "한국",
         "مرحبا", "🙂", "👩‍👩‍👧‍👦", "👍🏽", "🇵🇹", "\U0001f9ff", "</s>", "<b>", "\t", "�", "stop", "st", "op"]  # fmt: skip


def run(cases: int, seed: int = 0) -> Cases:
    found, draw = Cases(), random.Random(seed)
    engine = bytes_engine(CHATML)
    with running(engine) as server:
        for number in range(cases):
            text = "x" + "".join(draw.choices(PARTS, k=draw.randrange(1, 14))) + "x"
            stops = _stops(text, draw) if number % 2 else []
            server.server.grammars.answer = lambda *_, text=text: Dictated(engine, text)
            with found.case(f"{number} {text!r} {stops}"):
                expected = _before_stop(text, stops).strip()
                (_responses if number % 5 == 4 and not stops else _chat)(server, expected, stops)
    return found


def _before_stop(text: str, stops: list[str]) -> str:
    """Return a text up to the stop string that is complete first; of two that end together, the one that begins first."""
    found = [(text.find(each) + len(each), text.find(each)) for each in stops if each in text]
    return text[: min(found)[1]] if found else text


def _stops(text: str, draw: random.Random) -> list[str]:
    """Return stop strings: a part of the text, one that only begins in it, one that is not in it."""
    start = draw.randrange(len(text))
    part = text[start : start + draw.randrange(1, 6)]
    return draw.sample([part, text[-2:] + "!", "\x00never", "stop", "DONE]"], k=draw.randrange(1, 4))


def _post(server: Running, path: str, body: dict[str, Any]) -> str:
    response = server.client()._client.post(f"{server.url}{path}", json={"model": "demo", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.content.decode()


def _events(raw: str) -> Iterable[tuple[str | None, str]]:
    """Read server-sent events strictly: lines end with LF only here, fields have one space after the colon."""
    assert raw.endswith("\n\n")
    for block in raw[:-2].split("\n\n"):
        name, data = None, []
        for line in block.split("\n"):
            field, _, value = line.partition(": ")
            assert "\r" not in line
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            else:
                assert line.startswith(":")
        if data:
            assert len(data) == 1
            yield name, data[0]


def _chat(server: Running, expected: str, stops: list[str]) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}
    body |= {"stop": stops} if stops else {}
    whole = json.loads(_post(server, "/v1/chat/completions", body))["choices"][0]
    assert whole["message"]["content"] == expected and whole["finish_reason"] == "stop"
    events = list(_events(_post(server, "/v1/chat/completions", body | {"stream": True})))
    assert [data for _, data in events].count("[DONE]") == 1 and events[-1] == (None, "[DONE]")
    chunks = [json.loads(data)["choices"][0] for _, data in events[:-1]]
    assert chunks[0]["delta"]["role"] == "assistant" and all("role" not in each["delta"] for each in chunks[1:])
    assert [each["finish_reason"] for each in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert "".join(each["delta"].get("content") or "" for each in chunks).strip() == expected
    stream = server.client().chat.completions.create(
        model="demo",
        temperature=0,
        stream=True,
        messages=body["messages"],
        stop=stops or None,
        response_format={"type": "json_object"},
    )
    assert "".join(each.choices[0].delta.content or "" for each in stream).strip() == expected


def _responses(server: Running, expected: str, _: list[str]) -> None:
    body = {"input": "x", "text": {"format": {"type": "json_object"}}}
    whole = json.loads(_post(server, "/v1/responses", body))
    assert whole["output"][0]["content"][0]["text"] == expected
    events = [
        (name, json.loads(data)) for name, data in _events(_post(server, "/v1/responses", body | {"stream": True}))
    ]
    assert all(name == data["type"] for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    deltas = [data["delta"] for name, data in events if name == "response.output_text.delta"]
    assert "".join(deltas).strip() == expected
    assert events[-1][1]["response"]["output"][0]["content"][0]["text"] == expected
