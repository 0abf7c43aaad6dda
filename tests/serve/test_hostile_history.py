"""What clients do to a history costs no prefill: reasoning stripped, calls written anew, white space lost, effort flipped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from loopserve import Engine
from loopserve.serve.settings import ServerSettings
from tests.models.test_chat import CHATML
from tests.serve import bytes_engine as templates
from tests.serve.conftest import Running
from tests.serve.test_tools import CHAT_TOOLS

Message = dict[str, Any]
TURNS = 5


def stripped(message: Message, turn: int) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def inlined(message: Message, turn: int) -> Message:
    """Put the reasoning back into the content, as Open WebUI and others do."""
    if "reasoning_content" not in message:
        return message
    return {
        "role": "assistant",
        "content": f"<think>\n{message['reasoning_content']}\n</think>\n\n{message['content']}",
    }


def trimmed(message: Message, turn: int) -> Message:
    return message | {"content": (message["content"] or "").strip()}


def padded(message: Message, turn: int) -> Message:
    return message | {"content": "\n" * turn + (message["content"] or "") + " \n"}


def in_parts(message: Message, turn: int) -> Message:
    if isinstance(message["content"], list):
        return message
    return message | {"content": [{"type": "text", "text": message["content"] or ""}]}


def as_the_sdk_writes(message: Message, turn: int) -> Message:
    if message["role"] != "assistant":
        return message
    return message | {"refusal": None, "annotations": [], "audio": None, "function_call": None}


def windows_lines(message: Message, turn: int) -> Message:
    return message | {"content": (message["content"] or "").replace("\r\n", "\n").replace("\n", "\r\n")}


def calls_anew(message: Message, turn: int) -> Message:
    """Write the arguments of calls with other spaces, escapes and order, under other ids."""
    calls = []
    for number, call in enumerate(message.get("tool_calls") or []):
        arguments = json.loads(call["function"]["arguments"])
        turned = dict(reversed(arguments.items()))
        text = (
            json.dumps(turned, indent=2) if turn % 2 else json.dumps(turned, separators=(",", ":"), ensure_ascii=False)
        )
        calls.append(
            {
                "id": f"call_{turn}_{number}",
                "type": "function",
                "index": number,
                "function": {"name": call["function"]["name"], "arguments": text},
            }
        )
    more = {"tool_calls": calls} if calls else {}
    if message["role"] == "tool":
        more["tool_call_id"] = f"call_{turn}_0"
    return message | more | ({"content": None} if calls and not message["content"] else {})


def _forget(message: Message, turn: int) -> Message:
    """Everything at once."""
    for change in (stripped, calls_anew, padded, as_the_sdk_writes):
        message = change(message, turn)
    return message


CHANGES: list[Callable[[Message, int], Message]] = [
    stripped, inlined, trimmed, padded, in_parts, as_the_sdk_writes, windows_lines, calls_anew, _forget,
]  # fmt: skip


def serving(engine: Engine) -> Running:
    running = Running(engine, ServerSettings("demo"))
    running.start()
    return running


def ask(server: Running, messages: list[Message], text: str, **options: Any) -> Any:
    dictated = templates.dictate(server, text)
    client = server.client()
    return client.chat.completions.create(
        model="demo", messages=messages, temperature=0, extra_body=dictated, **options
    )


def again(reply: Any, held: int) -> tuple[int, int]:
    """Return the tokens that were computed for a request, and those that are new in it: with the token that ended the answer."""
    usage = reply.usage
    return usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens - held + 1


def message_of(reply: Any) -> Message:
    found = reply.choices[0].message
    message: Message = {"role": "assistant", "content": found.content}
    if getattr(found, "reasoning_content", None):
        message["reasoning_content"] = found.reasoning_content
    if found.tool_calls:
        message["tool_calls"] = [each.model_dump() for each in found.tool_calls]
    return message


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("template", [CHATML, templates.REASONING], ids=["plain", "reasoning"])
def test_a_changed_history_is_not_computed_again(template: str, change: Callable[[Message, int], Message]) -> None:
    server, draw = serving(templates.bytes_engine(template)), random.Random(1)
    try:
        history: list[Message] = []
        held = 0
        for turn in range(TURNS):
            history = [change(each, turn) for each in history]
            history.append({"role": "user", "content": f"question {turn}\nwith two lines " + "x" * draw.randrange(40)})
            thought = "I think about it.\n" * 4 + "</think>\n\n" if template is templates.REASONING else ""
            reply = ask(
                server, history, f"{thought} answer {turn}:\nsecond line\n", reasoning_effort=("low", "high")[turn % 2]
            )
            computed, new = again(reply, held)
            assert turn == 0 or computed <= new * 1.01, f"turn {turn}: {computed} tokens computed, {new} are new"
            held = reply.usage.total_tokens
            history.append(message_of(reply))
    finally:
        server.stop()


@pytest.mark.parametrize("change", [as_the_sdk_writes, calls_anew, _forget], ids=lambda each: each.__name__)
@pytest.mark.parametrize("template", [templates.HERMES, CHATML], ids=["hermes", "generic"])
def test_calls_that_are_written_anew_are_not_computed_again(
    template: str, change: Callable[[Message, int], Message]
) -> None:
    server = serving(templates.bytes_engine(template))
    tools = json.loads(json.dumps(CHAT_TOOLS))
    try:
        history: list[Message] = [{"role": "user", "content": "the weather?"}]
        held = 0
        for turn in range(TURNS):
            call = json.dumps({"name": "get_weather", "arguments": {"city": "Évora", "unit": "C"}}, ensure_ascii=False)
            look = "Look:\n" if turn % 2 else ""
            reply = ask(server, history, f"{look}<tool_call>\n{call}\n</tool_call>", tools=tools)
            computed, new = again(reply, held)
            assert turn == 0 or computed <= new * 1.01, f"turn {turn}: {computed} tokens computed, {new} are new"
            held = reply.usage.total_tokens
            assert reply.choices[0].message.tool_calls
            history += [message_of(reply), {"role": "tool", "tool_call_id": "call_x", "content": "12 degrees"}]
            history = [change(each, turn) for each in history]
            tools = [{**each, "function": dict(reversed(each["function"].items()))} for each in tools]
    finally:
        server.stop()
