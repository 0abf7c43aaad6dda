"""Serve ``/v1/responses``: create, stream, show, delete, cancel, list input items, compact."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from loopserve.core.engine.sampling import FinishReason
from loopserve.serve.answer import Answer, Reply
from loopserve.serve.ask import Ask
from loopserve.serve.continuing import continued
from loopserve.serve.errors import ApiError, as_api_error, invalid, not_found
from loopserve.serve.openapi import body_of
from loopserve.serve.protocol import CompactRequest, ResponsesRequest
from loopserve.serve.records import new_id
from loopserve.serve.rendering import figures, headers, usage
from loopserve.serve.response_items import as_items, messages_of, write_compaction
from loopserve.serve.response_output import Output
from loopserve.serve.server import Server, identity, plain_id, server_of, tenant_of_request
from loopserve.serve.streaming import Event, EventStream, while_connected
from loopserve.serve.tooling import Tooling, read_tools, schema_of

router = APIRouter()
_COMPACT = (
    "Summarise the conversation so far, so that the summary can replace it. Keep facts, names, figures and tasks."
)


class Cancelled(ApiError):
    """Report that a response was cancelled by another request."""

    def __init__(self) -> None:
        super().__init__(409, "the response was cancelled", code="response_cancelled")


@dataclass(frozen=True)
class Asked:
    """Hold a request for a response that was read: what is to be answered, and what is shown of it."""

    body: ResponsesRequest
    ask: Ask
    items: list[dict[str, Any]]
    tooling: Tooling


@router.post("/v1/responses", **body_of(ResponsesRequest))
async def create_response(request: Request) -> Response:
    """Answer the input, after the response or conversation that it goes on from."""
    server = server_of(request)
    body = await server.read(request, ResponsesRequest)
    asked = await _read(server, request, body)
    async with AsyncExitStack() as stack:
        answer = await while_connected(request, stack.enter_async_context(server.conversations.begin(asked.ask)))
        server.metrics.began(answer)
        server.running[answer.id] = answer
        stack.callback(server.running.pop, answer.id, None)
        if body.stream:
            return EventStream(_events(server, asked, answer), stack.pop_all(), headers(answer))
        output = Output(answer.id)
        try:
            reply = await while_connected(request, _collect(answer, output))
        except Cancelled:
            return JSONResponse(_response(server, asked, answer, "cancelled"), headers=headers(answer))
        return JSONResponse(await _complete(server, asked, answer, output, reply), headers=headers(answer))
    raise AssertionError("unreachable")


async def _read(server: Server, request: Request, body: ResponsesRequest) -> Asked:
    """Find what a request goes on from. Instructions and tools are those of this request, whatever came before had."""
    server.check_effort(None if body.reasoning is None else body.reasoning.effort)
    tenant, items = tenant_of_request(request), as_items(body.input)
    tooling = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    form = None if body.text is None else body.text.format
    messages, who = await continued(
        server,
        tenant,
        identity(request, body),
        tooling.messages,
        messages_of(items),
        body.instructions,
        replace_instructions=True,
    )
    ask = Ask(
        tenant=tenant,
        messages=messages,
        sampling=body.sampling,
        stack=body.loopserve.stack,
        store=body.store is not False,
        grammar=await server.form(tooling, schema_of(form, "text.format"), "text.format", body),
        reads_calls=bool(tooling.functions),
        parallel_calls=tooling.parallel,
        **who,
    )
    return Asked(body, ask, items, tooling)


async def _collect(answer: Answer, output: Output) -> Reply:
    found: Reply | None = None
    async for delta in answer:
        for _ in output.add(delta):
            pass
        found = delta.reply or found
    assert found is not None
    return found


async def _complete(server: Server, asked: Asked, answer: Answer, output: Output, reply: Reply) -> dict[str, Any]:
    """Return a complete response, which is kept before its client sees it."""
    whole = reply.finish_reason is FinishReason.STOP
    for _ in output.end(complete=whole):
        pass
    response = _response(server, asked, answer, "completed" if whole else "incomplete", output, reply)
    server.metrics.ended(answer, [reply])
    if asked.ask.store:
        kept = {"response": response, "items": asked.items}
        store = server.conversations.store
        await server.conversations.on_disk(lambda: store.put_object(asked.ask.tenant, answer.id, kept))
    return response


async def _events(server: Server, asked: Asked, answer: Answer) -> AsyncIterator[str]:
    """Give the events of a response in their order."""
    numbers = count()

    def event(kind: str, **fields: Any) -> Event:
        name = f"response.{kind}"
        return Event(name, json.dumps({"type": name, "sequence_number": next(numbers), **fields}))

    begun = _response(server, asked, answer, "in_progress")
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    output, reply = Output(answer.id), None
    try:
        async for delta in answer:
            for kind, fields in output.add(delta):
                yield event(kind, **fields)
            reply = delta.reply or reply
        assert reply is not None
        for kind, fields in output.end(complete=reply.finish_reason is FinishReason.STOP):
            yield event(kind, **fields)
        response = await _complete(server, asked, answer, output, reply)
        yield event(response["status"], response=response)
    except Cancelled:
        yield event("incomplete", response=begun | {"status": "cancelled"})
    except Exception as error:
        wrong = {"code": "server_error", "message": as_api_error(error).message}
        yield event("failed", response=begun | {"status": "failed", "error": wrong})


def _response(
    server: Server,
    asked: Asked,
    answer: Answer,
    status: str,
    output: Output | None = None,
    reply: Reply | None = None,
) -> dict[str, Any]:
    """Return a response as the API shows it. output, reply: of one that is over."""
    body, sampling = asked.body, asked.ask.sampling
    text = body.text.model_dump(exclude_none=True) if body.text is not None else {}
    reasoning = body.reasoning
    shown: dict[str, Any] = {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": int(answer.created),
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": server.settings.model_name,
        "output": output.items if output is not None else [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "conversation": None if body.conversation is None else {"id": f"conv_{plain_id(body.conversation)}"},
        "prompt_cache_key": body.prompt_cache_key,
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": asked.ask.store,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "top_logprobs": body.top_logprobs or 0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"} | text,
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "tool_choice": body.tool_choice if body.tool_choice is not None else "auto",
        "tools": [_shown_tool(each) for each in body.tools or () if each.get("type") == "function"],
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
    if output is not None and reply is not None:
        shown["usage"] = _usage(answer, reply)
        shown["loopserve"] = figures(answer, [reply])
    return shown


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": None, "parameters": None, "strict": False, **tool.get("function", {})}
    return shown | {key: value for key, value in tool.items() if key != "function"}


def _usage(answer: Answer, reply: Reply) -> dict[str, Any]:
    found = usage(answer, [reply])
    thought = found.completion_tokens_details.reasoning_tokens if found.completion_tokens_details else 0
    return {
        "input_tokens": found.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": found.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": thought or 0},
        "total_tokens": found.total_tokens,
    }


# Responses that are kept.


async def _kept(request: Request, response: str) -> dict[str, Any]:
    conversations = server_of(request).conversations
    found = await conversations.on_disk(
        lambda: conversations.store.object(tenant_of_request(request), plain_id(response))
    )
    if found is None or "response" not in found:
        raise not_found("response", response, "response_not_found")
    return found


@router.get("/v1/responses/{response}")
async def show_response(request: Request, response: str, stream: bool = False) -> Response:
    """Show a response that is complete, or one under way as far as it is known."""
    if stream:
        raise invalid("stream: a response is streamed by the request that creates it only", "stream")
    return JSONResponse((await _kept(request, response))["response"])


@router.delete("/v1/responses/{response}")
async def delete_response(request: Request, response: str) -> dict[str, Any]:
    """Delete a response; its turn as well, unless the conversation went on from it."""
    await _kept(request, response)
    conversations, tenant, turn = server_of(request).conversations, tenant_of_request(request), plain_id(response)

    def work() -> bool:
        gone = conversations.store.remove_turn(tenant, turn)
        if gone:
            conversations.files.remove([turn])
        else:
            conversations.store.put_object(tenant, turn, {"deleted": True})
        return gone

    if await conversations.on_disk(work):
        await conversations.worker.acall(lambda: conversations.live.drop({turn}))
    return {"id": response, "object": "response", "deleted": True}


@router.post("/v1/responses/{response}/cancel")
async def cancel_response(request: Request, response: str) -> Response:
    """End a response under way; its turn is taken back whole."""
    answer = server_of(request).running.get(plain_id(response))
    if answer is None or answer.ask.tenant != tenant_of_request(request):
        await _kept(request, response)
        raise invalid("the response is complete already: there is nothing to cancel")
    answer.abort(Cancelled())
    return JSONResponse({"id": response, "object": "response", "status": "cancelled"})


@router.get("/v1/responses/{response}/input_items")
async def list_input_items(
    request: Request,
    response: str,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: Annotated[str | None, Query(max_length=255)] = None,
) -> dict[str, Any]:
    """List the items of the request that made a response."""
    return listed((await _kept(request, response))["items"], limit, order, after)


def listed(items: Sequence[dict[str, Any]], limit: int, order: str, after: str | None) -> dict[str, Any]:
    """Return a page of items. after: id of the item before the page."""
    found = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        ids = [each["id"] for each in found]
        if after not in ids:
            raise invalid(f"after: no item {after[:80]!r}", "after")
        found = found[ids.index(after) + 1 :]
    page = found[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > limit,
    }


@router.post("/v1/responses/compact", **body_of(CompactRequest))
async def compact(request: Request) -> Response:
    """Have the model summarise a conversation; the item that is returned stands for it as input of other requests."""
    server = server_of(request)
    body = await server.read(request, CompactRequest)
    if body.stream:
        raise invalid("stream: a compaction is not streamed", "stream")
    asked = await _read(
        server, request, body.model_copy(update={"input": [*as_items(body.input), _request()], "store": False})
    )
    async with server.conversations.begin(asked.ask) as answer:
        server.metrics.began(answer)
        replies = await while_connected(request, answer.replies())
        server.metrics.ended(answer, replies)
        name = new_id()
        item = {
            "id": f"cmp_{name}",
            "type": "compaction",
            "encrypted_content": write_compaction(replies[0].text.strip()),
        }
        return JSONResponse(
            {
                "id": f"resp_{name}",
                "object": "response.compaction",
                "created_at": int(answer.created),
                "output": [item],
                "usage": _usage(answer, replies[0]),
            },
            headers=headers(answer),
        )
    raise AssertionError("unreachable")


def _request() -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": _COMPACT}
