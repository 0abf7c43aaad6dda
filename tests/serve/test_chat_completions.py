"""Chat completions by the official client: answers, streams, what is reused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from loopserve import Engine
from tests.serve.conftest import FACT, QUESTION, Running, until

LONG = {"temperature": 0, "max_tokens": 400, "extra_body": {"ignore_eos": True}}


def ask(server: Running, messages: list[Any], **options: Any) -> Any:
    return server.client().chat.completions.create(model="demo", messages=messages, **({"temperature": 0} | options))


def said(completion: Any) -> dict[str, str]:
    return {"role": "assistant", "content": completion.choices[0].message.content}


def cached(completion: Any) -> int:
    return int(completion.usage.prompt_tokens_details.cached_tokens)


def test_an_answer_is_that_of_a_session_and_says_what_was_reused(server: Running, engine: Engine) -> None:
    with engine.session() as session:
        expected = [session.send(FACT["content"]), session.send(QUESTION["content"])]
    first = ask(server, [FACT])
    second = ask(server, [FACT, said(first), QUESTION])
    assert [said(each)["content"] for each in (first, second)] == [each.text for each in expected]
    assert first.choices[0].finish_reason == "stop" and cached(first) == 0
    assert first.usage.completion_tokens == len(expected[0].token_ids)
    held = first.usage.prompt_tokens + first.usage.completion_tokens
    assert cached(second) == held - 1  # the token that ended the answer is computed with the next turn
    assert second.usage.prompt_tokens > held


def test_the_headers_say_hit_or_miss_and_why(server: Running) -> None:
    raw = server.client().chat.completions.with_raw_response
    first = raw.create(model="demo", messages=[FACT], temperature=0, extra_headers={"x-session-id": "mine"})
    assert first.headers["x-loopserve-cache"] == "miss: new conversation"
    answer = said(first.parse())
    again = raw.create(
        model="demo", messages=[FACT, answer, QUESTION], temperature=0, extra_headers={"x-session-id": "mine"}
    )
    assert again.headers["x-loopserve-cache"] == f"hit {cached(again.parse())}"
    assert again.headers["x-loopserve-session"] == first.headers["x-loopserve-session"]
    other = raw.create(
        model="demo", messages=[QUESTION, answer, FACT], temperature=0, extra_headers={"x-session-id": "mine"}
    )
    assert other.headers["x-loopserve-cache"] == "miss: message 0 differs"


def test_a_stream_joins_to_the_whole_answer(server: Running) -> None:
    whole = ask(server, [FACT, {"role": "assistant", "content": "ok ."}, QUESTION])
    chunks = list(
        ask(
            server,
            [FACT, {"role": "assistant", "content": "ok ."}, QUESTION],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == said(whole)["content"]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(each.usage is None for each in chunks[:-1])
    assert len({each.id for each in chunks}) == 1


def test_a_stream_ends_with_done(server: Running) -> None:
    body = {"model": "demo", "messages": [FACT], "stream": True, "temperature": 0}
    with server.connection("/v1/chat/completions", body, {"Connection": "close"}) as connection:
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert "content-type: text/event-stream" in text.lower()
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer_and_takes_it_back(server: Running, stream: bool) -> None:
    first = ask(server, [FACT])
    messages = [FACT, said(first), QUESTION]
    body = {"model": "demo", "messages": messages, "stream": stream, "max_tokens": 4000, "ignore_eos": True}
    scheduler = server.conversations.worker.scheduler
    with server.connection("/v1/chat/completions", body):
        until(lambda: scheduler.running and scheduler._running[0].output)
    until(lambda: not scheduler.running)
    until(lambda: len(server.conversations.live) == 1)
    assert server.conversations.worker.admitted == 0
    second = ask(server, messages)
    assert cached(second) > first.usage.prompt_tokens
    assert said(second)["content"] == "lisbon is amber falcon river ."


def test_a_client_that_leaves_the_queue_is_forgotten(serve: Callable[..., Running]) -> None:
    server = serve(max_num_seqs=1, max_queued=1)
    scheduler = server.conversations.worker.scheduler
    body = {"model": "demo", "messages": [FACT], "max_tokens": 4000, "ignore_eos": True}
    with server.connection("/v1/chat/completions", body):
        until(lambda: scheduler.running)
        with server.connection("/v1/chat/completions", body):
            until(lambda: scheduler.waiting == 1)
            with pytest.raises(openai.InternalServerError) as caught:
                ask(server, [FACT])
            assert caught.value.status_code == 503
            assert caught.value.code == "server_overloaded"
            assert int(caught.value.response.headers["retry-after"]) >= 1
        until(lambda: scheduler.waiting == 0)
        assert scheduler.running == 1
    until(lambda: scheduler.running == 0)
    assert said(ask(server, [FACT]))["content"] == "ok ."


def test_an_edited_message_branches_at_the_last_common_turn(server: Running) -> None:
    first = ask(server, [FACT])
    begun = [FACT, said(first)]
    one = ask(server, [*begun, QUESTION])
    other = ask(server, [*begun, {"role": "user", "content": "what is the code of lisbon again ?"}])
    assert cached(other) == cached(one)
    assert other.loopserve["session_id"] != one.loopserve["session_id"] == first.loopserve["session_id"]
    on = ask(server, [*begun, QUESTION, said(one), QUESTION])  # the old branch is still there
    assert cached(on) == one.usage.prompt_tokens + one.usage.completion_tokens - 1


def test_two_tenants_share_nothing(serve: Callable[..., Running]) -> None:
    server = serve(api_keys=("one", "two"))
    for key in ("one", "two"):
        client = server.client(key)
        reply = client.chat.completions.create(model="demo", messages=[FACT], temperature=0)
        assert cached(reply) == 0
    more = [FACT, said(reply), QUESTION]
    assert cached(server.client("one").chat.completions.create(model="demo", messages=more, temperature=0)) > 0
    with pytest.raises(openai.AuthenticationError):
        server.client("three").chat.completions.create(model="demo", messages=more)
