"""Translate between the items of the Responses API and the messages of a conversation."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loopserve.models.messages import TOOLS, Message, writable
from loopserve.models.tool_calls import ToolCall, calls_of, calls_text
from loopserve.serve.errors import ApiError, invalid
from loopserve.serve.records import new_id

_TEXT = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_ROLES = ("system", "developer", "user", "assistant")
SUMMARY = "Summary of the conversation so far:\n"


def as_items(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the input of a request as items with ids, as the server shows them again."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}] if given else []
    found = []
    for each in given:
        item = {key: value for key, value in each.items() if value is not None}
        item.setdefault("type", "message")
        if item["type"] == "message" and isinstance(item.get("content"), str):
            kind = "output_text" if item.get("role") == "assistant" else "input_text"
            item["content"] = [
                {"type": kind, "text": item["content"]} | ({"annotations": []} if kind == "output_text" else {})
            ]
        item.setdefault("status", "completed")
        item.setdefault("id", f"{_PREFIXES.get(item['type'], 'item_')}{new_id()}")
        found.append(item)
    return found


_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the messages that items stand for. ApiError (400) for a type that is not known, with its place."""
    reader = _Reader()
    for number, item in enumerate(items):
        try:
            reader.read(item)
        except ApiError as error:
            raise invalid(f"input[{number}]: {error.message}", "input") from None
    return reader.messages


class _Reader:
    """Collect messages. Calls become part of the assistant's message before them, reasoning part of the one after it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._thought = ""
        self._calls: list[ToolCall] = []  # of the last message

    def read(self, item: Mapping[str, Any]) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._message(item)
        elif kind in ("function_call", "custom_tool_call"):
            arguments = item.get("arguments") if kind == "function_call" else json.dumps({"input": item.get("input")})
            self._call(item, arguments)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            self._add({"role": "tool", "content": _text(item.get("output")), "tool_call_id": str(item.get("call_id"))})
        elif kind == "reasoning":
            self._thought += _text(item.get("content") or [])
        elif kind == "compaction":
            self._add({"role": "user", "content": SUMMARY + read_compaction(item.get("encrypted_content"))})
        else:
            raise invalid(f"items of type {str(kind)[:80]!r} are not supported")

    def _message(self, item: Mapping[str, Any]) -> None:
        role = item.get("role")
        if role not in _ROLES:
            raise invalid(f"role {str(role)[:80]!r} is not known (known: {', '.join(_ROLES)})")
        message = {"role": str(role), "content": _text(item.get("content"))}
        if role == "assistant" and self._thought:
            message["reasoning_content"], self._thought = self._thought, ""
        self._add(message)

    def _call(self, item: Mapping[str, Any], arguments: object) -> None:
        try:
            (call,) = calls_of(
                [{"id": item.get("call_id"), "function": {"name": item.get("name"), "arguments": arguments}}]
            )
        except Exception as error:
            raise invalid(f"no call of a function: {error}") from None
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._message({"role": "assistant", "content": ""})
        self._calls.append(call)
        self.messages[-1]["tool_calls"] = calls_text(self._calls)

    def _add(self, message: Message) -> None:
        if not all(writable(text) for text in message.values()):
            raise invalid("the content holds bytes that are no text; send it as UTF-8")
        self._calls = []
        self.messages.append(message)


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid("a content is text, or a list of parts of type text")
    found = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            found.append(part["refusal"])
            continue
        if kind not in _TEXT or not isinstance(part.get("text"), str):
            raise invalid(f"a content has a part of type {str(kind)[:80]!r}; known is text")
        found.append(part["text"])
    return "".join(found)


def items_of(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return the items that the messages of a stored conversation stand for."""
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == TOOLS:
            continue
        if message["role"] == "tool":
            found.append(
                {
                    "type": "function_call_output",
                    "call_id": message.get("tool_call_id", ""),
                    "output": message["content"],
                }
            )
            continue
        if thought := message.get("reasoning_content"):
            found.append({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thought}]})
        if message["content"] or "tool_calls" not in message:
            found.append({"type": "message", "role": message["role"], "content": message["content"]})
        for call in json.loads(message.get("tool_calls", "[]")):
            arguments = call["function"]["arguments"]
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append(
                {"type": "function_call", "call_id": call["id"], "name": call["function"]["name"], "arguments": text}
            )
    return as_items(found)


# Compaction: the summary that the model wrote, in the opaque form of the API.


def write_compaction(summary: str) -> str:
    """Return a summary as the content of a compaction item. It is opaque to clients, not secret: the conversation is theirs."""
    return base64.urlsafe_b64encode(json.dumps({"loopserve": 1, "summary": summary}).encode()).decode()


def read_compaction(content: object) -> str:
    """Return the summary in a compaction item. ApiError (400) for one that another server wrote."""
    try:
        given = json.loads(base64.urlsafe_b64decode(str(content).encode()))
        if given["loopserve"] == 1 and isinstance(given["summary"], str):
            return str(given["summary"])
    except (ValueError, KeyError, TypeError):
        pass
    raise invalid("the compaction was not written by this server")


# Output items.


def message_item(name: str, text: str, status: str = "completed", logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """Return an answer's text as an item; with no content yet while it is in progress."""
    content = [] if status == "in_progress" else [text_part(text, logprobs)]
    return {"id": name, "type": "message", "status": status, "role": "assistant", "content": content}


def text_part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the part of a message item."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def reasoning_item(name: str, text: str | None) -> dict[str, Any]:
    """Return reasoning as an item; None: nothing of it has arrived yet."""
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {"id": name, "type": "reasoning", "summary": [], "content": content}


def call_item(name: str, call: ToolCall, *, done: bool = True) -> dict[str, Any]:
    """Return a call as an item."""
    return {
        "id": name,
        "type": "function_call",
        "status": "completed" if done else "in_progress",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments if done else "",
    }
