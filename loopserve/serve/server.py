"""Hold what the routes share: the conversations, the settings, the readiness of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from loopserve.serve.answer import Answer
from loopserve.serve.body import read_body
from loopserve.serve.conversations import Conversations
from loopserve.serve.errors import ApiError, invalid, stopping
from loopserve.serve.metrics import Metrics
from loopserve.serve.protocol import ChatRequest, GenerationRequest, ResponsesRequest
from loopserve.serve.sessions import Sessions
from loopserve.serve.settings import ServerSettings
from loopserve.serve.structured import Grammar, Grammars
from loopserve.serve.tooling import Tooling, answer_form

B = TypeVar("B", bound=BaseModel)
ID_PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "conv_")
# Headers that name a conversation, with those of the body in the order in which they count.
SESSION_HEADER, WEBUI_HEADER = "x-session-id", "x-openwebui-chat-id"


@dataclass
class Server:
    """Hold what the routes share; ``server_of(request)`` finds it."""

    settings: ServerSettings
    conversations: Conversations
    metrics: Metrics
    sessions: Sessions
    grammars: Grammars
    running: dict[str, Answer] = field(default_factory=dict)  # responses under way, by id
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    async def read(self, request: Request, model: type[B], *, empty: bool = False) -> B:
        """Return the checked body of a request for this server. ApiError says what is wrong with it.

        empty: no body at all stands for an empty object.
        """
        if issubclass(model, GenerationRequest):
            # Before the body is read: overload is to cost as little as it can.
            self.conversations.worker.check_space(request.scope["tenant"])
        body = await read_body(request, model, self.settings.max_body_bytes, empty=empty)
        if self.draining:
            raise stopping()
        if isinstance(body, GenerationRequest):
            self.check_model(body.model)
            if body.n > self.settings.max_n:
                raise invalid(f"n: at most {self.settings.max_n} answers to one request", "n")
        return body

    async def form(
        self, tooling: Tooling, schema: Mapping[str, Any] | None, param: str, body: GenerationRequest
    ) -> Grammar | None:
        """Return the form that the answer to a request must have; None if it is free."""
        engine = self.conversations.engine
        found = await asyncio.to_thread(answer_form, engine, self.grammars, tooling, schema, param)
        if found is not None and body.ignore_eos:
            raise invalid("ignore_eos: an answer of a given form ends with the form", "ignore_eos")
        return found

    def check_effort(self, effort: str | None) -> None:
        """Raise ApiError (400) for an effort of reasoning, if it would be a matter of the model's template."""
        template = str(getattr(self.conversations.engine.tokenizer.tokenizer, "chat_template", None))
        if effort is not None and "reasoning_effort" in template:
            raise invalid(
                "reasoning effort: this model's levels are not supported by the server; leave it out", "reasoning"
            )

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) for a model that is not served here."""
        if name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name[:80]!r} is not served here; known is {self.settings.model_name!r}",
                code="model_not_found",
                param="model",
            )


def server_of(request: Request) -> Server:
    """Return the server that a request came to."""
    server: Server = request.app.state.server
    return server


def tenant_of_request(request: Request) -> str:
    """Return the tenant of a request, set by ``Security``."""
    tenant: str = request.scope["tenant"]
    return tenant


def plain_id(name: str) -> str:
    """Return an id of the API without the prefix that says what it is the id of."""
    for prefix in ID_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def conversation_key(request: Request, body: GenerationRequest) -> str | None:
    """Return the client's own name for a conversation, with its origin; None if it gives none. The first that is there counts."""
    names = (
        (SESSION_HEADER, request.headers.get(SESSION_HEADER)),
        ("session_id", body.session_id),
        ("prompt_cache_key", body.prompt_cache_key),
        (WEBUI_HEADER, request.headers.get(WEBUI_HEADER)),
    )
    for origin, name in names:
        if name:
            if len(name) > 255:
                raise invalid(f"{origin}: at most 255 characters", origin)
            return name if origin in (SESSION_HEADER, "session_id") else f"{origin}:{name}"
    return None


def identity(request: Request, body: ChatRequest | ResponsesRequest) -> dict[str, Any]:
    """Return who is meant by a request, as keywords of ``Ask``: previous, session, key."""
    return {
        "previous": None if body.previous_response_id is None else plain_id(body.previous_response_id),
        "session": None if body.conversation is None else plain_id(body.conversation),
        "key": conversation_key(request, body),
    }
