"""Read the tool calls in an answer, for the chat templates whose format is known, and write them where a template knows no tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from loopserve.core.errors import InputError

MAX_CALLS = 128  # of one message
_KEY = re.compile(r"[A-Za-z0-9_$.-]+\Z")  # keys like these need no care


@dataclass(frozen=True)
class ToolCall:
    """Hold one call of a function. arguments: JSON text, normally an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid4().hex[:24]}")


@dataclass(frozen=True)
class ToolFormat:
    """Hold how a template family writes calls.

    begin: the text that begins calls. end: the text that ends one; empty if the end of the answer does. bare: a call may be the whole
    answer, without ``begin``. grammar: a call for constrained decoding in the Lark dialect, with the text before and after it.
    """

    name: str
    begin: str
    end: str
    read: Callable[[str], list[ToolCall]] = field(repr=False)
    arguments: str = "arguments"  # name of the field that holds them
    bare: bool = False
    before: str = ""  # written before the JSON of a forced call
    after: str = ""


def _objects(text: str) -> list[ToolCall]:
    """Return the calls in JSON text: one object, a list of objects, or several separated by semicolons or white space."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while match := re.compile(r"[\s;]*").match(text, at):
        at = match.end()
        if at >= len(text):
            break
        value, at = decoder.raw_decode(text, at)
        found += value if isinstance(value, list) else [value]
    if not found:
        raise ValueError("no call")
    return [_call(each) for each in found]


def _call(value: Any) -> ToolCall:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("no call")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        json.loads(arguments)
        return ToolCall(value["name"], arguments)
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _mistral(text: str) -> list[ToolCall]:
    """Return the calls after ``[TOOL_CALLS]``: a list of objects, or ``name[ARGS]{...}`` as later versions write it."""
    named = re.match(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?={)", text)
    if named is None:
        return _objects(text)
    value, end = json.JSONDecoder().raw_decode(text, named.end())
    rest = text[end:].strip().removeprefix("[TOOL_CALLS]")
    return [ToolCall(named[1], json.dumps(value, ensure_ascii=False)), *(_mistral(rest) if rest else [])]


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", _objects, before="<tool_call>\n", after="\n</tool_call>")
LLAMA = ToolFormat("llama", "<|python_tag|>", "", _objects, arguments="parameters", bare=True)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", _mistral)
# For templates that know no tools: definitions, calls and results are written in the Hermes form, in ordinary messages.
GENERIC = ToolFormat("generic", "<tool_call>", "</tool_call>", _objects, before="<tool_call>\n", after="\n</tool_call>")


def tool_format(template: object) -> ToolFormat | None:
    """Return the format of a chat template. None: it writes tools in a way that is not known here."""
    if template is None:
        return None
    text = str(template)
    if not re.search(r"\btools?\b|tool_calls", text):
        return GENERIC
    if "<function=" in text or "<arg_key>" in text or "<|channel|>" in text:
        return None
    if "<tool_call>" in text:
        return HERMES
    if "[TOOL_CALLS]" in text:
        return MISTRAL
    if "<|python_tag|>" in text or re.search(r'"name": function name, "parameters"', text):
        return LLAMA
    return None


class CallReader:
    """Split the text of an answer, as it arrives, into text and calls. What cannot be read as a call stays text."""

    def __init__(self, known: ToolFormat) -> None:
        self._format = known
        self._held = ""
        self._inside = self._begun = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text; return the text that is no call, and the calls that are complete."""
        known, given = self._format, ""
        calls: list[ToolCall] = []
        self._held += text
        if known.bare and not self._begun and not self._inside:
            if not self._held.strip():
                return "", []
            self._begun = True
            self._inside = self._held.lstrip().startswith("{")
        while True:
            if self._inside:
                at = self._held.find(known.end) if known.end else -1
                if at < 0:
                    return given, calls
                body, self._held, self._inside = self._held[:at], self._held[at + len(known.end) :], False
                try:
                    calls += known.read(body.strip().removeprefix(known.begin))
                except ValueError:
                    given += body + known.end
                continue
            at = self._held.find(known.begin)
            if at < 0:
                keep = _beginning(self._held, known.begin)
                given += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                return given, calls
            given, self._held, self._inside = given + self._held[:at], self._held[at:], True

    def close(self) -> tuple[str, list[ToolCall]]:
        """End the answer; return what was held back."""
        held, self._held = self._held, ""
        if not self._inside:
            return held, []
        try:
            return "", self._format.read(held.strip().removeprefix(self._format.begin))
        except ValueError:
            return held, []


def _beginning(text: str, mark: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)


# Calls within messages.


def calls_of(given: object) -> list[ToolCall]:
    """Return the calls of an assistant message of the chat API. Raises InputError for what is no call of a function."""
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) > MAX_CALLS:
        raise InputError(f"tool_calls are a list of at most {MAX_CALLS} calls")
    found = []
    for number, each in enumerate(given):
        function = each.get("function") if isinstance(each, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"tool_calls[{number}] is no call of a function: it has no function with a name")
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str):
            raise InputError(f"tool_calls[{number}]: the arguments are JSON text, not {type(arguments).__name__}")
        found.append(ToolCall(function["name"], arguments, str(each.get("id") or "call_0")))
    return found


def calls_text(calls: Sequence[ToolCall]) -> str:
    """Return calls as a message of the conversation holds them: JSON, with arguments as objects, which templates expect."""
    return json.dumps(
        [
            {"id": each.id, "type": "function", "function": {"name": each.name, "arguments": _parsed(each.arguments)}}
            for each in calls
        ],
        ensure_ascii=False,
    )


def _parsed(arguments: str) -> Any:
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def strings_of(value: Any) -> list[str]:
    """Return the texts in a JSON value that people can have written: all of its strings, and keys that are no plain names."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for each in value for text in strings_of(each)]
    if isinstance(value, dict):
        return [
            text for key, each in value.items() for text in (*(() if _KEY.match(key) else (key,)), *strings_of(each))
        ]
    return []


def with_strings(value: Any, texts: Iterator[str]) -> Any:
    """Return a copy of a JSON value with other texts in place of ``strings_of``."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, list):
        return [with_strings(each, texts) for each in value]
    if isinstance(value, dict):
        return {(key if _KEY.match(key) else next(texts)): with_strings(each, texts) for key, each in value.items()}
    return value


# Templates without tools.

_INTRODUCTION = (
    "You can call functions. Their signatures are within <tools></tools>, one JSON object in a line:\n<tools>\n{tools}\n</tools>\n"
    "To call one, answer with a JSON object of its name and its arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{{"name": "the name", "arguments": {{}}}}\n</tool_call>'
)


def spelled_out(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Return messages in which tools, calls and results are ordinary text, for a template that knows none of them."""
    found: list[dict[str, Any]] = []
    for message in messages:
        plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if found and found[-1].get("answers"):
                found[-1]["content"] += "\n" + text
                continue
            plain |= {"role": "user", "content": text, "answers": True}
        for call in message.get("tool_calls", ()):
            text = json.dumps(call["function"], ensure_ascii=False)
            plain["content"] = f"{plain['content']}\n<tool_call>\n{text}\n</tool_call>".lstrip()
        found.append(plain)
    if tools:
        text = _INTRODUCTION.format(tools="\n".join(json.dumps(each, ensure_ascii=False) for each in tools))
        if found and found[0]["role"] in ("system", "developer"):
            found[0]["content"] = f"{found[0]['content']}\n\n{text}"
        else:
            found.insert(0, {"role": "system", "content": text})
    return found
