"""Serve ``/v1/conversations``: sessions under the names of the Responses API."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from loopserve.serve.openapi import body_of
from loopserve.serve.protocol import MAX_MESSAGES
from loopserve.serve.records import StoredSession, new_id
from loopserve.serve.response_items import as_items, items_of, messages_of
from loopserve.serve.responses import listed
from loopserve.serve.server import plain_id, server_of, tenant_of_request

router = APIRouter()
Metadata = Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)]


class ConversationRequest(BaseModel):
    """Hold a request to begin a conversation. items: what it begins with."""

    model_config = ConfigDict(extra="forbid")

    items: Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES)] | None = None
    metadata: Metadata | None = None


class MetadataRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    metadata: Metadata


def _shown(session: StoredSession, kept: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"conv_{session.id}",
        "object": "conversation",
        "created_at": int(session.created),
        "metadata": kept.get("metadata") or {},
    }


@router.post("/v1/conversations", **body_of(ConversationRequest, required=False))
async def create_conversation(request: Request) -> dict[str, Any]:
    """Begin a conversation; the responses that name it follow each other."""
    server, tenant, now = server_of(request), tenant_of_request(request), time.time()
    body = await server.read(request, ConversationRequest, empty=True)
    items = as_items(body.items or [])
    messages_of(items)  # refused here, not by the first response
    session = StoredSession(new_id(), tenant, None, None, now, now)
    kept = {"items": items, "metadata": body.metadata}

    def work() -> None:
        server.conversations.store.put_session(session)
        server.conversations.store.put_object(tenant, session.id, kept)

    await server.conversations.on_disk(work)
    return _shown(session, kept)


async def _found(request: Request, conversation: str) -> tuple[StoredSession, list[dict[str, Any]], dict[str, Any]]:
    """Return a conversation, its items, and what is kept beside it."""
    server, tenant = server_of(request), tenant_of_request(request)
    session, path = await server.sessions.show(tenant, plain_id(conversation))
    store = server.conversations.store
    kept = await server.conversations.on_disk(lambda: store.object(tenant, session.id) or {})
    items = items_of(path.messages) if path.turns else kept.get("items", [])
    for number, item in enumerate(items):
        item["id"] = f"{item['id'].partition('_')[0]}_{session.id}_{number}"  # the same in every listing
    return session, items, kept


@router.get("/v1/conversations/{conversation}")
async def show_conversation(request: Request, conversation: str) -> dict[str, Any]:
    """Show a conversation."""
    session, _, kept = await _found(request, conversation)
    return _shown(session, kept)


@router.post("/v1/conversations/{conversation}", **body_of(MetadataRequest))
async def update_conversation(request: Request, conversation: str) -> dict[str, Any]:
    """Replace the metadata of a conversation."""
    server, tenant = server_of(request), tenant_of_request(request)
    body = await server.read(request, MetadataRequest)
    session, _, kept = await _found(request, conversation)
    kept = {"items": kept.get("items", []), "metadata": body.metadata}
    await server.conversations.on_disk(lambda: server.conversations.store.put_object(tenant, session.id, kept))
    return _shown(session, kept)


@router.delete("/v1/conversations/{conversation}")
async def delete_conversation(request: Request, conversation: str) -> dict[str, Any]:
    """Delete a conversation with its turns, as far as no other goes through them."""
    await server_of(request).sessions.remove(tenant_of_request(request), plain_id(conversation))
    return {"id": conversation, "object": "conversation.deleted", "deleted": True}


@router.get("/v1/conversations/{conversation}/items")
async def list_items(
    request: Request,
    conversation: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=255)] = None,
) -> dict[str, Any]:
    """List the items of a conversation."""
    _, items, _ = await _found(request, conversation)
    return listed(items, limit, order, after)
