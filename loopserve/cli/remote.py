"""Hold a conversation with an OpenAI-compatible server, for the chat loop. Needs no model and no further package."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopserve.core.atomic_file import write_atomically
from loopserve.core.errors import ConfigError, InputError, LoopServeError

_TIMEOUT_S = 600.0
_RENAMED = {"max_new_tokens": "max_tokens"}


class ServerError(LoopServeError):
    """Report an answer that a server did not give. The conversation stands at its last complete turn."""


@dataclass(frozen=True)
class RemoteReply:
    """Hold one answer of a server. Its tokens are not known here."""

    text: str
    reasoning: str | None = None
    token_ids: Sequence[int] = ()


@dataclass(frozen=True)
class RemoteTurn:
    """Hold the figures of one turn. What a server does not report is None."""

    number: int
    usage: Mapping[str, Any]
    figures: Mapping[str, Any]  # the block ``loopserve``, of servers that have it
    ttft_ms: float
    tpot_ms: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under the names of ``TurnStats``."""
        prompt = self.usage.get("prompt_tokens") or 0
        cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return {
            "turn": self.number,
            "prompt_tokens": prompt - cached,
            "reused_tokens": cached,
            "output_tokens": self.usage.get("completion_tokens") or 0,
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "prefill_cell_density": self.figures.get("prefill_density"),
            "coverage_estimated": None,
            "attended_fraction": self.figures.get("attended_fraction"),
            "kv_bytes_per_token": self.figures.get("kv_bytes_per_token"),
            "store_bytes": 0,
            "active_bytes": 0,
        }


@dataclass
class _Answer:
    """Collect the chunks of one answer."""

    text: str = ""
    reasoning: str = ""
    times: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    whole: bool = False

    def take(self, chunk: Mapping[str, Any], at: float) -> str:
        """Add a chunk; return its text. Raises ServerError for one that reports an error."""
        if error := chunk.get("error"):
            raise ServerError(f"the server stopped the answer: {_message(error)}")
        self.usage = chunk.get("usage") or self.usage
        self.figures = chunk.get("loopserve") or self.figures
        given = ""
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            given += delta.get("content") or ""
            self.reasoning += delta.get("reasoning_content") or ""
            self.whole |= choice.get("finish_reason") is not None
        if given:
            self.times.append(at)
            self.text += given
        return given


class RemoteConversation:
    """Keep the messages of a conversation here and send them with every turn; the server finds what it holds of them."""

    def __init__(
        self, url: str, model: str | None = None, *, api_key: str | None = None, system: str | None = None
    ) -> None:
        """model: the first that the server lists if not given. Raises ConfigError if no server answers at ``url``."""
        self._url = url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url}: it must begin with http:// or https://")
        self._key = api_key
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.model = model or self._first_model()
        self.turns: list[RemoteTurn] = []
        self.last_reply: RemoteReply | None = None

    def stream(self, text: str, **sampling: Any) -> Iterator[str]:
        """Send a message and yield the answer as it arrives. An answer that breaks off is taken back, with its message."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer, sent = _Answer(), time.perf_counter()
        with closing(self._post(messages, sampling)) as reply:
            for chunk in _chunks(reply):
                if piece := answer.take(chunk, time.perf_counter() - sent):
                    yield piece
        if not answer.whole:
            raise ServerError("the server ended the answer before it was complete; /retry sends the message again")
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.last_reply = RemoteReply(answer.text, answer.reasoning or None)
        self.turns.append(_turn(len(self.turns), answer))

    def stream_retry(self, **sampling: Any) -> Iterator[str]:
        """Give another answer to the last message; if that breaks off, the old one stays."""
        kept = self.messages, list(self.turns), self.last_reply
        done = False
        try:
            yield from self.stream(self.undo()["content"], **sampling)
            done = True
        finally:
            if not done:
                self.messages, self.turns, self.last_reply = kept

    def undo(self) -> Mapping[str, str]:
        """Take back the last turn; return its message."""
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise InputError("nothing to undo: the conversation has no turn")
        taken, self.messages = self.messages[asked[-1]], self.messages[: asked[-1]]
        del self.turns[-1:]
        self.last_reply = None
        return taken

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, in the form that ``Engine.load_session`` reads. InputError if that fails."""
        try:
            write_atomically(
                path, json.dumps({"version": 1, "messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{path}: cannot save the conversation ({reason})") from error

    # Requests.

    def _post(self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any]) -> http.client.HTTPResponse:
        given = {_RENAMED.get(name, name): value for name, value in sampling.items() if name != "progress"}
        body = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
        }
        return self._open("/v1/chat/completions", json.dumps(body | given).encode())

    def _open(self, path: str, data: bytes | None = None) -> http.client.HTTPResponse:
        try:
            request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
            if self._key is not None:
                request.add_unredirected_header("Authorization", f"Bearer {self._key}")  # for this server only
            found: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise ServerError(f"{error.code} from {self._url}: {_message(error.read())}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(f"no server answers at {self._url} ({reason})") from error
        return found

    def _first_model(self) -> str:
        try:
            with closing(self._open("/v1/models")) as reply:
                return str(json.loads(reply.read())["data"][0]["id"])
        except ServerError as error:
            raise ConfigError(f"--url: {error}") from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"--url {self._url}: it lists no model ({error}); name one with --model") from error


def _chunks(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream of server-sent events. Raises ServerError if it breaks off."""
    try:
        for line in reply:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            chunk = json.loads(data)
            if isinstance(chunk, dict):
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerError(f"the connection broke off ({error or type(error).__name__})") from error


def _turn(number: int, answer: _Answer) -> RemoteTurn:
    tokens, times = answer.usage.get("completion_tokens") or len(answer.times), answer.times
    tpot = (times[-1] - times[0]) * 1e3 / (tokens - 1) if tokens > 1 and len(times) > 1 else None
    return RemoteTurn(number, answer.usage, answer.figures, times[0] * 1e3 if times else 0.0, tpot)


def _message(error: object) -> str:
    """Return the message of an error object, or of a body that holds one."""
    found: Any = error
    if isinstance(found, bytes):
        with suppress(ValueError):
            found = json.loads(found)
    if isinstance(found, Mapping):
        found = found.get("error", found)
    if isinstance(found, Mapping):
        found = found.get("message", found)
    return (found.decode(errors="replace") if isinstance(found, bytes) else str(found))[:500]
