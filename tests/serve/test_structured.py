"""Answers of a given form: JSON that a schema allows, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

pytest.importorskip("llguidance")

from loopserve.serve.settings import ServerSettings
from tests.serve.bytes_engine import HERMES, bytes_engine
from tests.serve.conftest import Running

USER = {"role": "user", "content": "who?"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    running = Running(bytes_engine(HERMES), ServerSettings("tiny"))
    running.start()
    yield running
    running.stop()


def check(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == SCHEMA["properties"].keys()
    assert len(found["name"]) <= 8 and 0 <= found["age"] <= 150 and found["kind"] in ("cat", "dog")


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_follows_its_schema(tiny: Running, seed: int) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    reply = tiny.client().chat.completions.create(
        model="tiny", messages=[USER], response_format=form, seed=seed, max_tokens=200, n=2
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)


def test_a_response_follows_its_schema_in_a_stream(tiny: Running) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA}}
    client = tiny.client()
    events = list(client.responses.create(model="tiny", input="who?", text=form, stream=True, max_output_tokens=200))
    last = events[-1].response
    check(last.output_text)
    assert last.text.format.schema_ == SCHEMA
    with client.responses.stream(model="tiny", input="who?", text=form, max_output_tokens=200) as stream:
        check(stream.get_final_response().output_text)


def test_any_object(tiny: Running) -> None:
    reply = tiny.client().chat.completions.create(
        model="tiny",
        messages=[USER],
        response_format={"type": "json_object"},
        max_tokens=300,
        seed=3,
        logit_bias={"93": 5},
    )
    text = reply.choices[0].message.content
    assert text.startswith("{")
    if reply.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_a_turn_of_a_given_form_can_go_on(tiny: Running) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA}}
    client = tiny.client()
    first = client.responses.create(model="tiny", input="who?", text=form, max_output_tokens=200)
    second = client.responses.create(
        model="tiny", input="and?", text=form, previous_response_id=first.id, max_output_tokens=200
    )
    check(second.output_text)
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1


BAD_SCHEMAS: list[Any] = [
    {"type": "strin"},
    {"type": "object", "properties": 3},
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"type": "string", "pattern": "("},
    {"$ref": "http://127.0.0.1/schema"},
    {"type": "string", "enum": ["x" * (300 << 10)]},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=range(len(BAD_SCHEMAS)))
def test_a_schema_that_cannot_be_followed_is_refused_by_name(tiny: Running, schema: Any) -> None:
    client = tiny.client()
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model="tiny",
            messages=[USER],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
    with pytest.raises(openai.BadRequestError, match=r"text\.format"):
        client.responses.create(
            model="tiny", input="x", text={"format": {"type": "json_schema", "name": "x", "schema": schema}}
        )


def test_other_formats_are_refused_by_name(tiny: Running) -> None:
    post = tiny.client()._client.post
    for form in ({"type": "grammar"}, {"type": "json_schema"}, {}):
        body = {"model": "tiny", "messages": [USER], "response_format": form}
        assert post(f"{tiny.url}/v1/chat/completions", json=body).status_code == 400
    body = {"model": "tiny", "messages": [USER], "response_format": {"type": "json_object"}, "ignore_eos": True}
    assert "ignore_eos" in post(f"{tiny.url}/v1/chat/completions", json=body).json()["error"]["message"]
