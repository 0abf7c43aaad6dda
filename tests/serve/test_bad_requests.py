"""Bad requests get the right status and OpenAI's error object, and the server goes on."""

from __future__ import annotations

import http.client
import json
from typing import Any

import openai
import pytest

from tests.serve.conftest import FACT, Running
from tests.serve.test_chat_completions import ask, said

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
OK: dict[str, Any] = {"model": "demo", "messages": [FACT]}
BAD: list[tuple[str, str, Any, int]] = [
    ("no JSON", CHAT, b"{", 400),
    ("empty body", CHAT, b"", 400),
    ("not UTF-8", CHAT, b'{"model": "\xff"}', 400),
    ("a list", CHAT, [], 400),
    ("NaN", CHAT, b'{"model": "demo", "messages": [], "temperature": NaN}', 400),
    ("too large a number", CHAT, b'{"model": "demo", "temperature": 1e999}', 400),
    ("many digits", CHAT, b'{"n": ' + b"9" * 5000 + b"}", 400),
    ("deep", CHAT, b"[" * 100_000, 400),
    ("no model", CHAT, {"messages": [FACT]}, 400),
    ("other model", CHAT, OK | {"model": "gpt"}, 404),
    ("no messages", CHAT, {"model": "demo"}, 400),
    ("empty messages", CHAT, OK | {"messages": []}, 400),
    ("unknown role", CHAT, OK | {"messages": [{"role": "king", "content": "x"}]}, 400),
    ("no content", CHAT, OK | {"messages": [{"role": "user"}]}, 400),
    ("an answer last", CHAT, OK | {"messages": [FACT, {"role": "assistant", "content": "x"}]}, 400),
    ("lone surrogate", CHAT, b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ("surrogate elsewhere", "/v1/responses", b'{"model": "demo", "input": "x", "metadata": {"a": "\\ud800"}}', 400),
    ("image", CHAT, OK | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
    ("n = 0", CHAT, OK | {"n": 0}, 400),
    ("n = 100", CHAT, OK | {"n": 100}, 400),
    ("n = true", CHAT, OK | {"n": True}, 400),
    ("hot", CHAT, OK | {"temperature": 3}, 400),
    ("top_p", CHAT, OK | {"top_p": 1.1}, 400),
    ("no tokens", CHAT, OK | {"max_tokens": 0}, 400),
    ("too many tokens", CHAT, OK | {"max_tokens": 1_000_000}, 400),
    ("too long a prompt", CHAT, OK | {"messages": [{"role": "user", "content": "is " * 20_000}]}, 400),
    ("empty stop", CHAT, OK | {"stop": [""]}, 400),
    ("stop number", CHAT, OK | {"stop": 3}, 400),
    ("bias of no token", CHAT, OK | {"logit_bias": {"x": 1}}, 400),
    ("bias beyond", CHAT, OK | {"logit_bias": {"99999999": 1}}, 400),
    ("top_logprobs alone", CHAT, OK | {"top_logprobs": 3}, 400),
    ("stream_options alone", CHAT, OK | {"stream_options": {"include_usage": True}}, 400),
    ("tools", CHAT, OK | {"tools": [{"type": "function"}]}, 400),
    ("json", CHAT, OK | {"response_format": {"type": "json_schema"}}, 400),
    ("template", CHAT, OK | {"chat_template": "{{ 7 * 7 }}"}, 400),
    ("unknown field", CHAT, OK | {"temprature": 1}, 400),
    ("unknown stack", CHAT, OK | {"loopserve": {"stack": "nope"}}, 404),
    ("unknown turn", CHAT, OK | {"previous_response_id": "resp_1"}, 404),
    ("unknown conversation", CHAT, OK | {"conversation": "conv_1"}, 404),
    ("strange token", TEXT, {"model": "demo", "prompt": [99_999_999]}, 400),
    ("no prompt", TEXT, {"model": "demo", "prompt": []}, 400),
    ("two prompts", TEXT, {"model": "demo", "prompt": ["a", "b"]}, 400),
    ("40 MiB", CHAT, b" " * (40 << 20), 413),
    ("no such path", "/v1/nothing", {}, 404),
    ("both", "/tokenize", {"prompt": "x", "messages": [FACT]}, 400),
    ("model of a number", CHAT, OK | {"model": 7}, 400),
    ("messages of a string", CHAT, OK | {"messages": "hello"}, 400),
    ("content of a number", CHAT, OK | {"messages": [{"role": "user", "content": 7}]}, 400),
    ("role null", CHAT, OK | {"messages": [{"role": None, "content": "x"}]}, 400),
    ("stream yes", CHAT, OK | {"stream": "yes"}, 400),
    ("stream 1", CHAT, OK | {"stream": 1}, 400),
    ("temperature below zero", CHAT, OK | {"temperature": -0.1}, 400),
    ("max_tokens beyond", CHAT, OK | {"max_tokens": 1 << 60}, 400),
    ("seed beyond", CHAT, OK | {"seed": 1 << 63}, 400),
    ("17 stops", CHAT, OK | {"stop": ["x"] * 17}, 400),
    ("21 logprobs", CHAT, OK | {"logprobs": True, "top_logprobs": 21}, 400),
    ("bias of 101", CHAT, OK | {"logit_bias": {"1": 101}}, 400),
    ("long name of a session", CHAT, OK | {"session_id": "x" * 256}, 400),
    ("penalty of zero", CHAT, OK | {"repetition_penalty": 0}, 400),
    (
        "a schema that is none",
        CHAT,
        OK | {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
        400,
    ),
    ("a URL", CHAT, OK | {"messages": [{"role": "user", "content": [{"type": "file", "file_id": "x"}]}]}, 400),
    ("calls that are no JSON", CHAT, OK | {"messages": [{"role": "assistant", "tool_calls": "x"}, FACT]}, 400),
    ("background", RESPONSES, {"model": "demo", "input": "x", "background": True}, 400),
    ("truncation", RESPONSES, {"model": "demo", "input": "x", "truncation": "auto"}, 400),
    ("two origins", RESPONSES, {"model": "demo", "input": "x", "previous_response_id": "a", "conversation": "b"}, 400),
    ("unknown include", RESPONSES, {"model": "demo", "input": "x", "include": ["everything"]}, 400),
    ("unknown item", RESPONSES, {"model": "demo", "input": [{"type": "item_reference", "id": "x"}]}, 400),
    ("no input", RESPONSES, {"model": "demo", "input": []}, 400),
    ("unknown response", RESPONSES, {"model": "demo", "input": "x", "previous_response_id": "resp_x"}, 404),
    ("prompt of floats", TEXT, {"model": "demo", "prompt": [1.5]}, 400),
    ("suffix", TEXT, {"model": "demo", "prompt": "x", "suffix": "y"}, 400),
]
CLASSES = {400: openai.BadRequestError, 404: openai.NotFoundError, 413: openai.APIStatusError}


def post(server: Running, path: str, body: object) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client()._client.post(
        f"{server.url}{path}", content=data, headers={"Content-Type": "application/json"}
    )
    return response.status_code, response.json()


@pytest.fixture(scope="module")
def shared(engine: Any) -> Any:
    from loopserve.serve.settings import ServerSettings

    running = Running(engine, ServerSettings("demo"))
    running.start()
    yield running
    running.stop()


@pytest.mark.parametrize(("path", "body", "status"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_requests_are_refused_by_name(shared: Running, path: str, body: object, status: int) -> None:
    found, answer = post(shared, path, body)
    assert found == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"} and answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]
    if isinstance(body, dict) and path.startswith("/v1/"):
        with pytest.raises(CLASSES[status]):
            shared.client().post(path.removeprefix("/v1"), body=body, cast_to=object)
    assert said(ask(shared, [FACT]))["content"] == "ok ."


@pytest.mark.parametrize("query", ["limit=x", "limit=0", "limit=1001", "limit=1&limit=y", "limit=9" + "9" * 5000])
def test_bad_queries_get_an_error_object_too(shared: Running, query: str) -> None:
    response = shared.client()._client.get(f"{shared.url}/v1/sessions?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "limit"


@pytest.mark.parametrize("value", [5e-324, 1e-300, 100.0])
@pytest.mark.parametrize("temperature", [0, 5e-324, 1])
def test_extreme_penalties_are_answered(shared: Running, value: float, temperature: float) -> None:
    reply = ask(shared, [FACT], temperature=temperature, extra_body={"repetition_penalty": value}, max_tokens=4)
    assert reply.usage.completion_tokens >= 1


def test_a_refused_request_leaves_its_connection_open(server: Running) -> None:
    body = OK | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.connect()
    connection.auto_open = 0  # type: ignore[misc]
    for _ in range(3):
        connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 400 and json.loads(reply.read())["error"]["message"]
    connection.close()


def test_several_answers_share_one_prefill(server: Running) -> None:
    reply = ask(server, [FACT], n=3, temperature=1, seed=5, logprobs=True, top_logprobs=2)
    assert [each.index for each in reply.choices] == [0, 1, 2]
    assert all(each.message.content is not None and each.logprobs.content is not None for each in reply.choices)
    one = ask(server, [FACT], temperature=1, seed=5)
    assert one.choices[0].message.content == reply.choices[0].message.content


def test_a_prompt_goes_on_without_a_template(server: Running) -> None:
    client = server.client()
    reply = client.completions.create(model="demo", prompt="the code of lisbon is", temperature=0, max_tokens=5)
    assert reply.usage is not None and reply.usage.completion_tokens >= 1
    pieces = client.completions.create(
        model="demo", prompt="the code of lisbon is", temperature=0, max_tokens=5, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == reply.choices[0].text


def test_sessions_are_listed_forked_undone_and_deleted(server: Running) -> None:
    first = ask(server, [FACT])
    http, base = server.client()._client, f"{server.url}/v1/sessions"
    (listed,) = http.get(base).json()["data"]
    assert listed["id"] == first.loopserve["session_id"]
    forked = http.post(f"{base}/{listed['id']}/fork").json()
    assert forked["head"] == listed["head"] and forked["id"] != listed["id"]
    assert http.post(f"{base}/{forked['id']}/undo").json()["head"] is None
    shown = http.get(f"{base}/{listed['id']}").json()
    assert shown["turns"][0]["answer"]["content"] == "ok ."
    assert http.delete(f"{base}/{listed['id']}").json()["deleted"]
    assert http.get(f"{base}/{listed['id']}").status_code == 404
    assert len(server.conversations.live) == 0
