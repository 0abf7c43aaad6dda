"""Serve ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message import ChatCompletionMessage
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from starlette.responses import Response

from loopserve.models.messages import as_messages
from loopserve.models.tool_calls import ToolCall
from loopserve.serve.answer import Answer, Delta, Reply
from loopserve.serve.answering import answered
from loopserve.serve.ask import Ask
from loopserve.serve.continuing import continued
from loopserve.serve.openapi import body_of
from loopserve.serve.protocol import ChatRequest
from loopserve.serve.rendering import chat_logprobs, figures, usage
from loopserve.serve.server import Server, identity, server_of, tenant_of_request
from loopserve.serve.tooling import read_tools, schema_of

router = APIRouter()
_FORMAT = "response_format"


@router.post("/v1/chat/completions", **body_of(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer the last message of a conversation."""
    server = server_of(request)
    body = await server.read(request, ChatRequest)
    server.check_effort(body.reasoning_effort)
    tooling = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    tenant, who, messages = tenant_of_request(request), identity(request, body), as_messages(body.messages)
    if who["previous"] is None:
        messages = [*tooling.messages, *messages]
    else:
        messages, who = await continued(server, tenant, who, tooling.messages, messages)
    ask = Ask(
        tenant=tenant,
        messages=messages,
        sampling=body.sampling,
        stack=body.loopserve.stack,
        attention_map=body.loopserve.attention_map,
        n=body.n,
        store=body.store is not False,
        grammar=await server.form(tooling, schema_of(body.response_format, _FORMAT), _FORMAT, body),
        reads_calls=bool(tooling.functions),
        parallel_calls=tooling.parallel,
        **who,
    )
    return await answered(request, server, body, ask, chunks=_chunks, whole=_completion)


def _completion(server: Server, answer: Answer, replies: list[Reply]) -> dict[str, Any]:
    choices = []
    for index, reply in enumerate(replies):
        text = reply.text.strip()
        content = text if text or not reply.calls else None
        message = ChatCompletionMessage(role="assistant", content=content, refusal=None, annotations=[])
        if reply.calls:
            message.tool_calls = [_call(call) for call in reply.calls]
        if reply.reasoning is not None:
            message.reasoning_content = reply.reasoning  # type: ignore[attr-defined]
        logprobs = None if reply.logprobs is None else ChoiceLogprobs(content=chat_logprobs(reply.logprobs))
        choices.append(Choice(index=index, message=message, finish_reason=_finish(reply), logprobs=logprobs))
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
    calls = [0] * body.n  # given so far, by index of the answer
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
        if each.reasoning:
            thought = ChoiceDelta()
            thought.reasoning_content = each.reasoning  # type: ignore[attr-defined]
            yield chunk([ChunkChoice(index=each.index, delta=thought, finish_reason=None)])
        if each.text or each.logprobs or each.attention:
            more = {"loopserve": {"attention": each.attention}} if each.attention else {}
            yield chunk([_text_chunk(each)], **more)
        for call in each.calls:
            yield chunk([_call_chunk(each.index, calls[each.index], call)])
            calls[each.index] += 1
        if each.reply is not None:
            replies[each.index] = each.reply
            yield chunk([ChunkChoice(index=each.index, delta=ChoiceDelta(), finish_reason=_finish(each.reply))])
    found = [replies[index] for index in sorted(replies)]
    server.metrics.ended(answer, found)
    if wants_usage:
        yield chunk([], usage=usage(answer, found), loopserve=figures(answer, found))
    yield "[DONE]"


def _finish(reply: Reply) -> Any:
    return "tool_calls" if reply.calls else str(reply.finish_reason)


def _call(call: ToolCall) -> ChatCompletionMessageFunctionToolCall:
    function = Function(name=call.name, arguments=call.arguments)
    return ChatCompletionMessageFunctionToolCall(id=call.id, type="function", function=function)


def _call_chunk(index: int, number: int, call: ToolCall) -> ChunkChoice:
    function = ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments)
    delta = ChoiceDelta(tool_calls=[ChoiceDeltaToolCall(index=number, id=call.id, type="function", function=function)])
    return ChunkChoice(index=index, delta=delta, finish_reason=None)


def _text_chunk(each: Delta) -> ChunkChoice:
    choice = ChunkChoice(index=each.index, delta=ChoiceDelta(content=each.text), finish_reason=None)
    if each.logprobs:
        choice.logprobs = ChunkLogprobs(content=chat_logprobs(each.logprobs))
    return choice
