"""Serve ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from starlette.responses import JSONResponse, Response

from loopserve.models.chat import as_messages
from loopserve.serve.answer import Answer, Delta, Reply
from loopserve.serve.ask import Ask
from loopserve.serve.protocol import ChatRequest
from loopserve.serve.rendering import chat_logprobs, figures, headers, usage
from loopserve.serve.server import Server, identity, server_of, tenant_of_request
from loopserve.serve.streaming import EventStream, while_connected

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer the last message of a conversation."""
    server = server_of(request)
    body = await server.read(request, ChatRequest)
    ask = Ask(
        tenant=tenant_of_request(request),
        messages=as_messages(body.messages),
        sampling=body.sampling,
        stack=body.loopserve.stack,
        n=body.n,
        store=body.store is not False,
        **identity(request, body),
    )
    async with AsyncExitStack() as stack:
        answer = await while_connected(request, stack.enter_async_context(server.conversations.begin(ask)))
        server.metrics.began(answer)
        if body.stream:
            return EventStream(_chunks(server, body, answer), stack.pop_all(), headers(answer))
        replies = await while_connected(request, answer.replies())
        server.metrics.ended(answer, replies)
        return JSONResponse(_completion(server, answer, replies), headers=headers(answer))
    raise AssertionError("unreachable")


def _completion(server: Server, answer: Answer, replies: list[Reply]) -> dict[str, Any]:
    choices = []
    for index, reply in enumerate(replies):
        message = ChatCompletionMessage(role="assistant", content=reply.text.strip(), refusal=None)
        if reply.reasoning is not None:
            message.reasoning_content = reply.reasoning  # type: ignore[attr-defined]
        logprobs = None if reply.logprobs is None else ChoiceLogprobs(content=chat_logprobs(reply.logprobs))
        choices.append(Choice(index=index, message=message, finish_reason=str(reply.finish_reason), logprobs=logprobs))
    completion = ChatCompletion(
        id=f"chatcmpl-{answer.id}",
        object="chat.completion",
        created=int(answer.created),
        model=server.settings.model_name,
        choices=choices,
        usage=usage(answer, replies),
    )
    return completion.model_dump(mode="json", exclude_unset=True) | {"loopserve": figures(answer, replies)}


async def _chunks(server: Server, body: ChatRequest, answer: Answer) -> AsyncIterator[str]:
    """Give the chunks of a stream as JSON, and the end mark."""
    replies: dict[int, Reply] = {}
    common: dict[str, Any] = {
        "id": f"chatcmpl-{answer.id}",
        "object": "chat.completion.chunk",
        "created": int(answer.created),
        "model": server.settings.model_name,
    }
    wants_usage = body.stream_options is not None and body.stream_options.include_usage

    def chunk(choices: list[ChunkChoice], **more: Any) -> str:
        if wants_usage:
            more = {"usage": None, **more}
        return ChatCompletionChunk(**common, choices=choices, **more).model_dump_json(exclude_unset=True)

    for index in range(body.n):
        delta = ChoiceDelta(role="assistant", content="")
        yield chunk([ChunkChoice(index=index, delta=delta, finish_reason=None)])
    async for each in answer:
        if each.text or each.logprobs:
            yield chunk([_text_chunk(each)])
        if each.reply is not None:
            replies[each.index] = each.reply
            last = ChoiceDelta()
            if each.reply.reasoning is not None:
                last.reasoning_content = each.reply.reasoning  # type: ignore[attr-defined]
            yield chunk([ChunkChoice(index=each.index, delta=last, finish_reason=str(each.reply.finish_reason))])
    found = [replies[index] for index in sorted(replies)]
    server.metrics.ended(answer, found)
    if wants_usage:
        yield chunk([], usage=usage(answer, found), loopserve=figures(answer, found))
    yield "[DONE]"


def _text_chunk(each: Delta) -> ChunkChoice:
    choice = ChunkChoice(index=each.index, delta=ChoiceDelta(content=each.text), finish_reason=None)
    if each.logprobs:
        choice.logprobs = ChunkLogprobs(content=chat_logprobs(each.logprobs))
    return choice
