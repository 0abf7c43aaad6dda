"""Find what all requests of a conversation have in common, so that they can be sent to the server that has its pairs in memory.

It chooses where a request is answered, never whether, and no answer depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request

from loopserve.models.messages import Message, as_messages
from loopserve.serve.finding import named_session
from loopserve.serve.protocol import ChatRequest, ResponsesRequest
from loopserve.serve.response_items import as_items, messages_of
from loopserve.serve.server import identity
from loopserve.serve.store import Store

REQUESTS: Mapping[str, type[ChatRequest | ResponsesRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
}


def routing_key(
    store: Store, tenant: str, request: Request, body: ChatRequest | ResponsesRequest, messages: Sequence[Message]
) -> str:
    """Return a digest of the tenant and the conversation that a request belongs to.

    The conversation is found as the server finds it: by the turn or session that the request names, then by the client's name for
    it, else by its messages. A conversation without a name is known by its first message of a user.
    """
    return _digest(tenant, _conversation(store, tenant, identity(request, body), messages))


def messages_in(body: ChatRequest | ResponsesRequest) -> list[Message]:
    """Return the messages of a request. Raises ApiError or InputError for what is none."""
    if isinstance(body, ChatRequest):
        return as_messages(body.messages)
    return messages_of(as_items(body.input))


def _conversation(store: Store, tenant: str, who: Mapping[str, Any], messages: Sequence[Message]) -> str:
    if who["previous"] is not None:
        turn = store.turn(tenant, who["previous"])
        if turn is not None:
            return _of_session(store, tenant, turn.session, turn.id)
    if who["session"] is not None:
        return _of_session(store, tenant, who["session"])
    if who["key"] is not None:
        known = store.session(tenant, who["key"])
        return named_session(tenant, who["key"]) if known is None else _of_session(store, tenant, known.id)
    return _opening(next((each["content"] for each in messages if each["role"] == "user"), ""))


def _of_session(store: Store, tenant: str, session: str, turn: str | None = None) -> str:
    """Return what the first request of a session was known by: a name if it had one, else its first message."""
    found = store.session(tenant, session)
    if found is None or found.key is not None or store.object(tenant, session) is not None:
        return session
    at = turn or found.head
    return session if at is None else _opening(store.title(tenant, at)[0])


def _opening(text: str) -> str:
    return "opening:" + text.replace("\r\n", "\n").strip()


def _digest(tenant: str, conversation: str) -> str:
    return hashlib.sha256(f"loopserve routing\n{tenant}\n{conversation}".encode()).hexdigest()
