"""Serve information about the server: models, tokenize, health, readiness, metrics, version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import loopserve
from loopserve.models.messages import as_messages
from loopserve.serve.openapi import body_of
from loopserve.serve.protocol import TokenizeRequest
from loopserve.serve.server import Server, server_of

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """List the one model that is served."""
    return {"object": "list", "data": [_model(server_of(request))]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Show the model."""
    server = server_of(request)
    server.check_model(name)
    return _model(server)


def _model(server: Server) -> dict[str, Any]:
    conversations = server.conversations
    return {
        "id": server.settings.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "loopserve",
        "max_model_len": conversations.engine.token_engine.model.max_positions,
        "loopserve": {
            "stack": conversations.engine.stack.name,
            "stacks": sorted({conversations.engine.stack.name, *conversations.stacks}),
            "fingerprint": conversations.model,
        },
    }


@router.post("/tokenize", **body_of(TokenizeRequest))
async def tokenize(request: Request) -> dict[str, Any]:
    """Return the tokens of a prompt, or of messages with the generation prompt."""
    server = server_of(request)
    body = await server.read(request, TokenizeRequest)
    conversations = server.conversations
    if body.model is not None:
        server.check_model(body.model)
    tokens = await conversations.tokens(
        as_messages(body.messages) if body.prompt is None else body.prompt, special=body.add_special_tokens
    )
    limit = conversations.engine.token_engine.model.max_positions
    return {"tokens": list(tokens), "count": len(tokens), "max_model_len": limit}


@router.get("/health")
async def health(request: Request) -> Response:
    """Say whether the model's thread runs, and its last passes did not all fail."""
    alive = server_of(request).conversations.worker.healthy
    return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Say whether requests are taken. After failed passes, no for some seconds and then yes, so that one is tried again."""
    server = server_of(request)
    state = "draining" if server.draining else "ready" if server.conversations.worker.ready else "dead"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return metrics in Prometheus' format."""
    return Response(server_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/version")
async def version() -> dict[str, str]:
    """Return the version of loopserve."""
    return {"version": loopserve.__version__}
