"""Serve ``/v1/sessions``: list, show, fork, undo, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict

from loopserve.serve.openapi import body_of
from loopserve.serve.protocol import Name
from loopserve.serve.server import plain_id, server_of, tenant_of_request
from loopserve.serve.sessions import as_json

router = APIRouter()


class ForkRequest(BaseModel):
    """Hold a request to fork a session. turn: where; not given: where the session is."""

    model_config = ConfigDict(extra="forbid")

    turn: Name | None = None


@router.get("/v1/sessions")
async def list_sessions(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
    """List the latest sessions of the caller."""
    found = await server_of(request).sessions.list(tenant_of_request(request), limit)
    return {"object": "list", "data": found}


@router.get("/v1/sessions/{session}")
async def show_session(request: Request, session: str) -> dict[str, Any]:
    """Show a session with its turns."""
    return as_json(*await server_of(request).sessions.show(tenant_of_request(request), session))


@router.post("/v1/sessions/{session}/fork", **body_of(ForkRequest, required=False))
async def fork_session(request: Request, session: str) -> dict[str, Any]:
    """Make another session that goes on from the same turn; both are independent then."""
    server = server_of(request)
    body = await server.read(request, ForkRequest, empty=True)
    turn = None if body.turn is None else plain_id(body.turn)
    return as_json(await server.sessions.fork(tenant_of_request(request), session, turn))


@router.post("/v1/sessions/{session}/undo")
async def undo_session(request: Request, session: str) -> dict[str, Any]:
    """Take back the last turn of a session."""
    return as_json(await server_of(request).sessions.undo(tenant_of_request(request), session))


@router.delete("/v1/sessions/{session}")
async def delete_session(request: Request, session: str) -> dict[str, Any]:
    """Delete a session."""
    await server_of(request).sessions.remove(tenant_of_request(request), session)
    return {"id": session, "object": "session.deleted", "deleted": True}
