"""The Responses API by the official client: answers, streams, what goes on from what, and what is kept."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.serve.conftest import FACT, QUESTION, Running, until
from tests.serve.test_chat_completions import ask

ANSWER = "lisbon is amber falcon river ."


def respond(server: Running, given: Any, **options: Any) -> Any:
    return server.client().responses.create(model="demo", input=given, **({"temperature": 0} | options))


def cached(response: Any) -> int:
    return int(response.usage.input_tokens_details.cached_tokens)


def test_a_response_is_the_answer_of_chat(server: Running) -> None:
    response = respond(server, FACT["content"])
    assert response.output_text == ask(server, [FACT]).choices[0].message.content == "ok ."
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_fifty_turns_by_previous_response_compute_new_tokens_only(server: Running) -> None:
    response, held = respond(server, [FACT]), 0
    for _ in range(50):
        held = response.usage.total_tokens
        response = respond(server, [QUESTION], previous_response_id=response.id)
        assert cached(response) >= held - 1  # the token that ends an answer is computed with the next turn
        assert response.usage.input_tokens - held < 20


def test_a_response_goes_on_from_any_earlier_one(server: Running) -> None:
    first = respond(server, [FACT])
    other = respond(server, "the code of paris is ember .", previous_response_id=first.id)
    assert respond(server, [QUESTION], previous_response_id=first.id).output_text == ANSWER
    assert respond(server, [QUESTION], previous_response_id=other.id).previous_response_id == other.id


def test_the_events_come_in_order_and_join_to_the_response(server: Running) -> None:
    first = respond(server, [FACT])
    events = list(respond(server, [QUESTION], previous_response_id=first.id, stream=True))
    kinds = [each.type.removeprefix("response.") for each in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds == [*begin, *["output_text.delta"] * deltas, *end]
    assert [each.sequence_number for each in events] == list(range(len(events)))
    last = events[-1].response
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == last.output_text
    assert last.output_text == ANSWER
    assert {each.item_id for each in events if hasattr(each, "item_id")} == {last.output[0].id}
    assert server.client().responses.retrieve(last.id).output_text == ANSWER


def test_events_have_names_of_their_own(server: Running) -> None:
    body = {"model": "demo", "input": "the code .", "stream": True}
    with server.connection("/v1/responses", body, {"Connection": "close"}) as connection:
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    lines = [line for line in text.splitlines() if line.startswith(("event: ", "data: "))]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_objects_follow_the_open_specification(server: Running) -> None:
    types = pytest.importorskip("openresponses_types.types")
    names = {
        "response.created": "ResponseCreatedStreamingEvent",
        "response.in_progress": "ResponseInProgressStreamingEvent",
        "response.output_item.added": "ResponseOutputItemAddedStreamingEvent",
        "response.content_part.added": "ResponseContentPartAddedStreamingEvent",
        "response.output_text.delta": "ResponseOutputTextDeltaStreamingEvent",
        "response.output_text.done": "ResponseOutputTextDoneStreamingEvent",
        "response.content_part.done": "ResponseContentPartDoneStreamingEvent",
        "response.output_item.done": "ResponseOutputItemDoneStreamingEvent",
        "response.completed": "ResponseCompletedStreamingEvent",
    }
    http = server.client()._client
    for options in ({}, {"top_logprobs": 2}):
        body = {"model": "demo", "input": "the code of lisbon is amber .", "temperature": 0, **options}
        whole = http.post(f"{server.url}/v1/responses", json=body).json()
        assert types.ResponseResource.model_validate(whole).status == "completed"
        assert bool(whole["output"][0]["content"][0]["logprobs"]) == bool(options)
        text = http.post(f"{server.url}/v1/responses", json=body | {"stream": True}).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
        for event in events:
            getattr(types, names[event["type"]]).model_validate(event)
    compacted = http.post(f"{server.url}/v1/responses/compact", json={"model": "demo", "input": "the code ."}).json()
    assert types.CompactResource.model_validate(compacted).output


def test_a_limit_makes_a_response_incomplete(server: Running) -> None:
    response = respond(server, [FACT], max_output_tokens=1)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"
    assert list(respond(server, [FACT], max_output_tokens=1, stream=True))[-1].type == "response.incomplete"


def test_input_items_stand_for_messages(server: Running) -> None:
    history = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": FACT["content"]}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok ."}]},
        QUESTION,
    ]
    respond(server, [FACT])
    response = respond(server, history)
    assert response.output_text == ANSWER and cached(response) > 0
    listed = server.client().responses.input_items.list(response.id, order="asc")
    assert [each.type for each in listed] == ["message", "reasoning", "message", "message"]
    newest = server.client().responses.input_items.list(response.id, limit=1)
    assert newest.has_more and newest.data[0].content[0].text == QUESTION["content"]


def test_a_conversation_holds_its_turns(server: Running) -> None:
    client = server.client()
    conversation = client.conversations.create(metadata={"topic": "codes"})
    respond(server, [FACT], conversation=conversation.id)
    response = respond(server, [QUESTION], conversation={"id": conversation.id})
    assert response.output_text == ANSWER and response.conversation.id == conversation.id
    items = list(client.conversations.items.list(conversation.id, order="asc"))
    assert [each.role for each in items] == ["user", "assistant"] * 2
    assert client.conversations.retrieve(conversation.id).metadata == {"topic": "codes"}
    assert client.conversations.update(conversation.id, metadata={"topic": "x"}).metadata == {"topic": "x"}
    assert client.conversations.delete(conversation.id).deleted
    for call in (client.conversations.retrieve, lambda name: respond(server, [QUESTION], conversation=name)):
        with pytest.raises(openai.NotFoundError):
            call(conversation.id)


def test_a_conversation_may_begin_with_items(server: Running) -> None:
    items = [FACT, {"role": "assistant", "content": "ok ."}]
    conversation = server.client().conversations.create(items=items)
    assert respond(server, [QUESTION], conversation=conversation.id).output_text == ANSWER
    assert len(list(server.client().conversations.items.list(conversation.id))) == 4


def test_what_is_not_stored_is_not_shown_and_can_go_on(server: Running) -> None:
    response = respond(server, [FACT], store=False)
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        server.client().responses.retrieve(response.id)
    assert respond(server, [QUESTION], previous_response_id=response.id).output_text == ANSWER


def test_a_deleted_response_is_gone(server: Running) -> None:
    client = server.client()
    first = respond(server, [FACT])
    second = respond(server, [QUESTION], previous_response_id=first.id)
    client.responses.delete(first.id)  # the second goes on from it, and keeps its turn
    assert client.responses.retrieve(second.id).output_text == ANSWER
    client.responses.delete(second.id)
    for gone in (first, second):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone.id)
        with pytest.raises(openai.NotFoundError):
            respond(server, [QUESTION], previous_response_id=gone.id)
    assert server.conversations.store.turn("anonymous", second.id.removeprefix("resp_")) is None


def test_a_response_under_way_is_cancelled(server: Running) -> None:
    client = server.client()
    stream = respond(server, [FACT], stream=True, max_output_tokens=4000, extra_body={"ignore_eos": True})
    events = iter(stream)
    name = next(events).response.id
    next(each for each in events if each.type == "response.output_text.delta")
    assert client.responses.cancel(name).status == "cancelled"
    assert list(events)[-1].response.status == "cancelled"
    until(lambda: not server.conversations.worker.scheduler.running)
    done = respond(server, [FACT])
    for wrong, error in ((name, openai.NotFoundError), (done.id, openai.BadRequestError)):
        with pytest.raises(error):
            client.responses.cancel(wrong)


def test_a_compaction_stands_for_a_conversation(server: Running) -> None:
    client = server.client()
    compacted = client.responses.compact(model="demo", input=[FACT, {"role": "assistant", "content": "ok ."}])
    (item,) = compacted.output
    assert item.type == "compaction"
    assert respond(server, [item.model_dump(), QUESTION]).status == "completed"


def test_another_key_sees_nothing(serve: Any) -> None:
    server = serve(api_keys=("one", "two"))
    first = server.client("one").responses.create(model="demo", input=FACT["content"])
    other = server.client("two")
    for call in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    with pytest.raises(openai.NotFoundError):
        other.responses.create(model="demo", input="the code .", previous_response_id=first.id)


BAD = [
    {"background": True},
    {"truncation": "auto"},
    {"input": []},
    {"input": [{"type": "item_reference", "id": "msg_1"}]},
    {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
    {"input": [{"role": "king", "content": "x"}]},
    {"input": [{"type": "compaction", "encrypted_content": "x"}]},
    {"input": [{"role": "assistant", "content": "x"}]},
    {"text": {"format": {"type": "poem"}}},
    {"text": {"verbosity": "high"}},
    {"include": ["secrets"]},
    {"prompt": {"id": "pmpt_1"}},
    {"instructions": "be brief"},  # the bundled model's template knows no system message
    {"conversation": "conv_1", "previous_response_id": "resp_1"},
    {"n": 2},
    {"temprature": 1},
]


@pytest.mark.parametrize("body", BAD, ids=[next(iter(each)) for each in BAD])
def test_what_cannot_be_done_is_refused_by_name(server: Running, body: dict[str, Any]) -> None:
    given = {"model": "demo", "input": "x"} | body
    reply = server.client()._client.post(f"{server.url}/v1/responses", json=given)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]
