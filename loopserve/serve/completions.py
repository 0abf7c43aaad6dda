"""Serve ``POST /v1/completions``: a prompt goes on as it is, without a template, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from openai.types import Completion, CompletionChoice
from starlette.responses import Response

from loopserve.serve.answer import Answer, Reply
from loopserve.serve.answering import answered
from loopserve.serve.ask import Ask
from loopserve.serve.errors import invalid
from loopserve.serve.openapi import body_of
from loopserve.serve.protocol import CompletionRequest
from loopserve.serve.rendering import completion_logprobs, figures, usage
from loopserve.serve.server import Server, server_of, tenant_of_request

router = APIRouter()


@router.post("/v1/completions", **body_of(CompletionRequest))
async def completions(request: Request) -> Response:
    """Continue a prompt."""
    server = server_of(request)
    body = await server.read(request, CompletionRequest)
    tokens = await server.conversations.tokens(body.prompt) if isinstance(body.prompt, str) else tuple(body.prompt)
    if not tokens:
        raise invalid("prompt: it is empty, and the model has no token that begins a text", "prompt")
    ask = Ask(
        tenant=tenant_of_request(request),
        messages=(),
        tokens=tokens,
        sampling=body.sampling,
        stack=body.loopserve.stack,
        attention_map=body.loopserve.attention_map,
        n=body.n,
    )
    return await answered(request, server, body, ask, chunks=_chunks, whole=_completion)


def _completion(server: Server, answer: Answer, replies: list[Reply]) -> dict[str, Any]:
    choices = [_choice(index, reply) for index, reply in enumerate(replies)]
    completion = Completion(**_common(server, answer), choices=choices, usage=usage(answer, replies))
    return completion.model_dump(mode="json", exclude_unset=True) | {"loopserve": figures(answer, replies)}


def _common(server: Server, answer: Answer) -> dict[str, Any]:
    return {
        "id": f"cmpl-{answer.id}",
        "object": "text_completion",
        "created": int(answer.created),
        "model": server.settings.model_name,
    }


def _choice(index: int, reply: Reply) -> CompletionChoice:
    logprobs = None if reply.logprobs is None else completion_logprobs(reply.logprobs)
    return CompletionChoice(index=index, text=reply.text, finish_reason=str(reply.finish_reason), logprobs=logprobs)


async def _chunks(server: Server, body: CompletionRequest, answer: Answer) -> AsyncIterator[str]:
    common, replies = _common(server, answer), {}
    given = [0] * body.n
    async for each in answer:
        choice: dict[str, Any] = {"index": each.index, "text": each.text, "finish_reason": None, "logprobs": None}
        if each.logprobs:
            choice["logprobs"] = completion_logprobs(each.logprobs, given[each.index])
            given[each.index] += sum(len(entry.token) for entry in each.logprobs)
        if each.reply is not None:
            replies[each.index] = each.reply
            choice["finish_reason"] = str(each.reply.finish_reason)
        if each.text or each.logprobs or each.reply is not None:
            # finish_reason is None while an answer goes on, which the type of the library does not know
            chunk = Completion.model_construct(**common, choices=[CompletionChoice.model_construct(**choice)])
            yield chunk.model_dump_json(exclude_unset=True, warnings=False)
    found = [replies[index] for index in sorted(replies)]
    server.metrics.ended(answer, found)
    if body.stream_options is not None and body.stream_options.include_usage:
        last = Completion.model_construct(**common, choices=[], usage=usage(answer, found))
        yield last.model_dump_json(exclude_unset=True)
    yield "[DONE]"
