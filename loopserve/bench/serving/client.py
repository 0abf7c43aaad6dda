"""Hold conversations with a server, as many at once as asked for, and note the times of every chunk."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from loopserve.core.errors import ConfigError

_WORDS = [
    "river",
    "stone",
    "market",
    "window",
    "garden",
    "letter",
    "engine",
    "bridge",
    "winter",
    "summer",
    "number",
    "teacher",
    "village",
    "captain",
    "island",
    "silver",
    "paper",
    "candle",
    "forest",
    "mirror",
    "ladder",
    "harbor",
    "copper",
    "violin",
    "planet",
    "doctor",
    "kitchen",
    "signal",
    "valley",
    "meadow",
]


@dataclass(frozen=True)
class Load:
    """Hold what is asked of a server.

    conversations: how many in all, each of ``turns`` turns that follow each other at once. first_words: length of the first message,
    words of others. rate: conversations that begin per second, at random times; None: as soon as ``concurrency`` allows.
    ignore_eos: have every answer take all of its ``output_tokens``; only servers that know the field answer then.
    """

    base_url: str
    model: str
    conversations: int = 16
    turns: int = 4
    first_words: int = 256
    words: int = 32
    output_tokens: int = 64
    rate: float | None = None
    concurrency: int | None = None
    ignore_eos: bool = False
    seed: int = 0
    api_key: str | None = None
    timeout_s: float = 600.0
    extra_body: dict[str, Any] = field(default_factory=dict)


@dataclass
class TurnTimes:
    """Hold one turn as its client saw it, times in seconds from its sending. error: what went wrong; all else is partial then."""

    conversation: int
    turn: int
    chunks: list[float] = field(default_factory=list)  # arrival of each chunk with text
    e2e: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    answer: str = ""
    finished: bool = False  # a chunk said why the answer ended
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Return the time to the first chunk with text; None for an answer without text."""
        return self.chunks[0] if self.chunks else None

    @property
    def itl(self) -> list[float]:
        """Return the times between chunks."""
        return [late - early for early, late in zip(self.chunks, self.chunks[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Return the mean time per output token after the first; None for answers of one token, or of one chunk."""
        if self.output_tokens < 2 or len(self.chunks) < 2:
            return None
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1)


async def hold(load: Load, progress: Callable[[int], None] = lambda done: None) -> tuple[list[TurnTimes], float]:
    """Return the turns of all conversations and the seconds that they took together.

    A conversation ends with its first error. progress: called with the number of conversations that are over. Raises ConfigError if
    the server does not answer at all, or does not have the model.
    """
    draw = random.Random(load.seed)
    openings = [[_text(draw, load.first_words)] for _ in range(load.conversations)]
    for each in openings:
        each += [_text(draw, load.words) for _ in range(load.turns - 1)]
    headers = {} if load.api_key is None else {"Authorization": f"Bearer {load.api_key}"}
    gate, found = asyncio.Semaphore(load.concurrency or load.conversations), list[TurnTimes]()
    async with httpx2.AsyncClient(
        headers=headers, timeout=load.timeout_s, limits=httpx2.Limits(max_connections=None)
    ) as client:
        await _check(client, load)
        over = 0

        async def one(number: int, messages: list[str]) -> None:
            nonlocal over
            async with gate:
                found.extend(await _converse(client, load, number, messages))
            over += 1
            progress(over)

        started, tasks = time.perf_counter(), []
        for number, messages in enumerate(openings):
            tasks.append(asyncio.create_task(one(number, messages)))
            if load.rate is not None:
                await asyncio.sleep(draw.expovariate(load.rate))
        await asyncio.gather(*tasks)
        return sorted(found, key=lambda each: (each.conversation, each.turn)), time.perf_counter() - started


async def _models(client: httpx2.AsyncClient, base_url: str) -> list[str]:
    """Return the models that a server lists. ConfigError says what is wrong with the server, or with the key."""
    try:
        reply = await client.get(f"{base_url}/v1/models")
    except httpx2.HTTPError as error:
        raise ConfigError(
            f"--base-url {base_url}: no server answers there ({error or type(error).__name__})"
        ) from error
    if reply.status_code == 401:
        raise ConfigError(f"--base-url {base_url}: the server wants a key; give --api-key or OPENAI_API_KEY")
    if reply.status_code != 200:
        raise ConfigError(f"--base-url {base_url}: /v1/models is answered {reply.status_code}; is it an OpenAI server?")
    try:
        return [str(each["id"]) for each in reply.json().get("data", [])]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"--base-url {base_url}: /v1/models is no list of models; is it an OpenAI server?") from error


async def _check(client: httpx2.AsyncClient, load: Load) -> None:
    known = await _models(client, load.base_url)
    if known and load.model not in known:
        raise ConfigError(f"--model {load.model!r} is not served at {load.base_url} (known: {', '.join(known)})")


async def first_model(base_url: str, api_key: str | None) -> str:
    """Return the first model that a server lists. Raises ConfigError if it lists none, see ``_models``."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with httpx2.AsyncClient(headers=headers, timeout=30) as client:
        known = await _models(client, base_url)
    if not known:
        raise ConfigError(f"--base-url {base_url}: no model is listed there; give --model")
    return known[0]


def _text(draw: random.Random, words: int) -> str:
    """Return words that no other message begins with, so that a prefix is cached only where its conversation was."""
    return " ".join([f"{draw.getrandbits(32):08x}", *draw.choices(_WORDS, k=max(1, words - 1))])


async def _converse(client: httpx2.AsyncClient, load: Load, number: int, texts: list[str]) -> list[TurnTimes]:
    history: list[dict[str, str]] = []
    found = []
    for turn, text in enumerate(texts):
        history.append({"role": "user", "content": text})
        times = TurnTimes(number, turn)
        found.append(times)
        await _answer(client, load, history, times)
        if times.error is not None:
            break
        history.append({"role": "assistant", "content": times.answer})
    return found


async def _answer(client: httpx2.AsyncClient, load: Load, history: list[dict[str, str]], times: TurnTimes) -> None:
    body: dict[str, Any] = {
        "model": load.model,
        "messages": history,
        "max_tokens": load.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= ({"ignore_eos": True} if load.ignore_eos else {}) | load.extra_body
    sent, ended = time.perf_counter(), False
    try:
        async with client.stream("POST", f"{load.base_url}/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                times.error = f"{reply.status_code}: {(await reply.aread()).decode(errors='replace')[:300]}"
                return
            async for line in reply.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    ended = True
                    break
                _take(json.loads(data), times, time.perf_counter() - sent)
    except (httpx2.HTTPError, ValueError) as error:
        times.error = f"{type(error).__name__}: {error}"
        return
    times.e2e = time.perf_counter() - sent
    if times.error is None and not (ended or times.finished):  # not every server sends [DONE]
        times.error = "the stream ended early"
    times.output_tokens = times.output_tokens or len(times.chunks)


def _take(chunk: dict[str, Any], times: TurnTimes, at: float) -> None:
    """Note one chunk of a stream."""
    if "error" in chunk:
        times.error = str(chunk["error"])[:300]
    for choice in chunk.get("choices") or []:
        delta = choice.get("delta") or {}
        times.finished |= choice.get("finish_reason") is not None
        if delta.get("content") or delta.get("reasoning_content"):
            times.chunks.append(at)
            times.answer += delta.get("content") or ""
    if usage := chunk.get("usage"):
        times.prompt_tokens, times.output_tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        times.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
