"""Write answers as the objects of the OpenAI API. Used by the chat and the completions routes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob as TopEntry
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from loopserve.models.logprobs import TokenLogprob
from loopserve.serve.answer import Answer, Reply


def headers(answer: Answer) -> dict[str, str]:
    """Return the headers of an answer: what was reused, and its session."""
    return {"x-loopserve-cache": answer.cache_note, "x-loopserve-session": answer.match.session.id}


def usage(answer: Answer, replies: Iterable[Reply]) -> CompletionUsage:
    """Return the token counts of a request; prompt_tokens are those of the whole conversation before the answer."""
    found = list(replies)
    completed, prompt = sum(len(each.tokens) for each in found), answer.prompt_tokens
    details: dict[str, Any] = {"prompt_tokens_details": PromptTokensDetails(cached_tokens=answer.cached_tokens)}
    if any(each.reasoning is not None for each in found):
        details["completion_tokens_details"] = CompletionTokensDetails(reasoning_tokens=sum(map(_thought, found)))
    return CompletionUsage(
        prompt_tokens=prompt, completion_tokens=completed, total_tokens=prompt + completed, **details
    )


def _thought(reply: Reply) -> int:
    """Return about how many tokens of an answer are reasoning, by its share of the characters."""
    if reply.reasoning is None:
        return 0
    letters = len(reply.reasoning) + len(reply.text)
    return round(len(reply.tokens) * len(reply.reasoning) / letters) if letters else 0


def figures(answer: Answer, replies: Iterable[Reply]) -> dict[str, Any]:
    """Return the block ``loopserve`` of a response: what the policies did, of the first answer."""
    reply = next(iter(replies))
    stats = reply.stats.as_dict()
    asked = {} if reply.attention is None else {"attention_map": reply.attention}
    return {
        "session_id": answer.match.session.id,
        "turn_id": answer.turns[0].id if 0 in answer.turns else None,
        "stack": answer.stack.name,
        "cache": answer.cache_note,
        "prefill_density": stats["prefill_tile_density"],
        "attended_fraction": stats["attended_fraction"],
        "attended_pairs": stats["attended_pairs"],
        "kv_bytes_per_token": stats["kv_bytes_per_token"],
        "dense_kv_bytes_per_token": stats["dense_kv_bytes_per_token"],
        "fallbacks": stats["fallbacks"],
        "ttft_ms": stats["ttft_ms"],
        "tpot_ms": stats["tpot_ms"],
        **asked,
    }


def chat_logprobs(entries: Iterable[TokenLogprob]) -> list[ChatCompletionTokenLogprob]:
    """Return log-probabilities in the form of chat completions."""
    return [
        ChatCompletionTokenLogprob(
            token=each.token,
            bytes=list(each.bytes),
            logprob=each.logprob,
            top_logprobs=[TopEntry(token=t.token, bytes=list(t.bytes), logprob=t.logprob) for t in each.top],
        )
        for each in entries
    ]


def completion_logprobs(entries: Iterable[TokenLogprob], offset: int = 0) -> Logprobs:
    """Return log-probabilities in the form of completions. offset: characters of the text before."""
    found = list(entries)
    offsets = []
    for each in found:
        offsets.append(offset)
        offset += len(each.token)
    return Logprobs(
        text_offset=offsets,
        tokens=[each.token for each in found],
        token_logprobs=[each.logprob for each in found],
        top_logprobs=[{t.token: t.logprob for t in each.top} for each in found],
    )
