"""What sends the requests of a conversation to one replica: the same key for every turn, however a client names it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from fastapi import Request

from loopserve.serve.finding import named_session
from loopserve.serve.protocol import ChatRequest, ResponsesRequest
from loopserve.serve.records import Path, StoredSession, StoredTurn, new_id
from loopserve.serve.routing import messages_in, routing_key
from loopserve.serve.store import Store

FIRST, SECOND = {"role": "user", "content": "good morning"}, {"role": "user", "content": "and now ?"}
ANSWER = {"role": "assistant", "content": "good morning ."}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(None)
    yield store
    store.close()


def key(
    store: Store, body: ChatRequest | ResponsesRequest, headers: Mapping[str, str] | None = None, tenant: str = "one"
) -> str:
    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return routing_key(store, tenant, Request({"type": "http", "headers": pairs}), body, messages_in(body))


def chat(*messages: dict[str, str], **options: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "demo", "messages": list(messages), **options})


def response(text: str, **options: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "demo", "input": text, **options})


def answered(store: Store, session: StoredSession, tenant: str = "one") -> StoredTurn:
    """Commit the turn that answers FIRST in a session."""
    turn = StoredTurn(
        id=new_id(),
        session=session.id,
        parent=None,
        tenant=tenant,
        model="m",
        stack="s",
        digest=b"d",
        messages=(SYSTEM, FIRST),
        answer=ANSWER,
        prompt_tokens=(1,),
        output_tokens=(2,),
        created=time.time(),
        finish_reason="stop",
        figures={},
    )
    moved = StoredSession(session.id, tenant, session.key, turn.id, session.created, session.updated)
    store.commit(Path((turn,)), moved)
    return turn


def session(name: str | None = None, tenant: str = "one") -> StoredSession:
    given = new_id() if name is None else named_session(tenant, name)
    return StoredSession(given, tenant, name, None, time.time(), time.time())


def test_a_conversation_without_a_name_is_known_by_its_first_message_of_a_user(store: Store) -> None:
    one = key(store, chat(SYSTEM, FIRST))
    assert one == key(store, chat(SYSTEM, FIRST, ANSWER, SECOND)) == key(store, response("good morning\r\n"))
    assert one != key(store, chat(SYSTEM, SECOND))


@pytest.mark.parametrize("name", ["header", "session_id", "prompt_cache_key", "webui"])
def test_a_name_counts_before_the_messages(store: Store, name: str) -> None:
    def named(value: str, *messages: dict[str, str]) -> str:
        if name in ("header", "webui"):
            header = "x-session-id" if name == "header" else "x-openwebui-chat-id"
            return key(store, chat(*messages), {header: value})
        return key(store, chat(*messages, **{name: value}))

    assert named("mine", FIRST) == named("mine", SECOND) != named("other", FIRST)
    assert named("mine", FIRST) != key(store, chat(FIRST))


def test_a_response_that_follows_another_has_the_key_of_the_first(store: Store) -> None:
    unnamed = answered(store, session())
    assert key(store, response("and now ?", previous_response_id=f"resp_{unnamed.id}")) == key(store, chat(FIRST))
    named = answered(store, session("mine"))
    following = response("and now ?", previous_response_id=named.id)
    assert key(store, following) == key(store, chat(FIRST), {"x-session-id": "mine"})
    assert key(store, following, {"x-session-id": "other"}) == key(store, following)


def test_a_conversation_of_the_api_keeps_its_key(store: Store) -> None:
    begun = session()
    store.put_session(begun)
    store.put_object("one", begun.id, {"items": []})
    one = key(store, response("good morning", conversation=f"conv_{begun.id}"))
    turn = answered(store, begun)
    assert one == key(store, response("and now ?", conversation={"id": f"conv_{begun.id}"}))
    assert one == key(store, response("and now ?", previous_response_id=turn.id))


def test_a_session_that_is_named_by_its_id_keeps_its_key(store: Store) -> None:
    turn = answered(store, session())
    assert key(store, chat(SECOND), {"x-session-id": turn.session}) == key(store, chat(FIRST))


def test_tenants_share_no_key_and_see_no_turn_of_another(store: Store) -> None:
    assert key(store, chat(FIRST), tenant="one") != key(store, chat(FIRST), tenant="two")
    turn = answered(store, session(tenant="two"), tenant="two")
    unknown = response("and now ?", previous_response_id=turn.id)
    assert key(store, unknown) == key(store, response("and now ?"))
