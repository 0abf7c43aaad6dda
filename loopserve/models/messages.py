"""Define the messages of a conversation, read them from the chat API, and refuse what cannot be answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from loopserve.core.errors import InputError
from loopserve.models.template import text_parts
from loopserve.models.tool_calls import calls_of, calls_text

# Role, content, and for an assistant optionally reasoning_content and tool_calls (JSON). A first message of the role ``TOOLS`` holds
# the definitions of the tools, as JSON.
Message = dict[str, str]
ROLES = ("system", "developer", "user", "assistant", "tool")
TOOLS = "tools"


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InputError unless the last message is to be answered and every message is text."""
    last = messages[-1] if messages else {"role": "assistant"}
    if last["role"] in ("assistant", TOOLS) or (last["role"] != "tool" and not last["content"].strip()):
        raise InputError("the message is empty: write something")
    if not all(writable(message["content"]) for message in messages):
        raise InputError("the message holds bytes that are no text; send it as UTF-8")


def as_messages(given: object) -> list[Message]:
    """Convert messages of the chat API (dictionaries of role and content).

    A content may be text or a list of parts of type text. Keys whose value is null count as absent. Raises InputError with the
    index of an invalid message.
    """
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InputError(f"messages are a list of dictionaries with role and content, not {type(given).__name__}")
    return [_as_message(each, number) for number, each in enumerate(given)]


def _as_message(given: object, number: int) -> Message:
    where = f"messages[{number}]"
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is a dictionary with role and content, not {type(given).__name__}")
    present = {key: value for key, value in given.items() if value is not None}
    role = present.pop("role", None)
    if role not in ROLES:
        raise InputError(f"{where}: role {role!r} is not known (known: {', '.join(ROLES)})")
    if "content" not in present and role != "assistant":
        raise InputError(f"{where} has no content: give it as text")
    content = present.pop("content", "")
    try:
        content = content if isinstance(content, str) else "".join(text_parts(content))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    thought = present.pop("reasoning_content", None)
    calls = present.pop("tool_calls", None) if role == "assistant" else None
    more = {"reasoning_content": str(thought)} if thought else {}
    if calls:
        try:
            more["tool_calls"] = calls_text(calls_of(json.loads(calls) if isinstance(calls, str) else calls))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except ValueError as error:
            raise InputError(f"{where}: tool_calls are a list of calls, not other text") from error
    if role == "tool" and isinstance(call := present.pop("tool_call_id", None), str):
        more["tool_call_id"] = call
    for key in ("name", "token_ids"):
        present.pop(key, None)
    if unknown := [key for key, value in present.items() if value not in ([], {}, "")]:
        raise InputError(
            f"{where}: {unknown[0]!r} is not supported (known: role, content, reasoning_content, tool_calls)"
        )
    if not all(writable(text) for text in (content, *more.values())):
        raise InputError(f"{where}: the content holds bytes that are no text; send it as UTF-8")
    return {"role": str(role), "content": content} | more


def writable(text: str) -> bool:
    """Return False for lone surrogates, which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
