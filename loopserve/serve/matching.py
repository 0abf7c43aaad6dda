"""Compare messages as clients send them with those that are stored, and index conversations by digests of their messages."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence

from loopserve.models.messages import Message

_REASONING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
ROOT = hashlib.sha256(b"loopserve conversation 1").digest()


def canonical(message: Message) -> dict[str, str]:
    """Return what counts when messages are compared: role, content and tool calls, without reasoning and outer white space.

    Clients strip the reasoning of earlier answers or put it into the content, and many trim white space, end lines with CR LF or
    write the JSON of calls anew.
    """
    content = message["content"].replace("\r\n", "\n")
    if message["role"] == "assistant":
        content = _REASONING.sub("", content, count=1)
    found = {"role": message["role"], "content": content.strip()}
    if "tool_calls" in message:
        calls = [each["function"] for each in json.loads(message["tool_calls"])]
        found["tool_calls"] = json.dumps(calls, sort_keys=True)
    return found


def extend(digest: bytes, messages: Sequence[Message]) -> bytes:
    """Return the digest of a conversation with more messages at its end."""
    for message in messages:
        text = json.dumps(canonical(message), sort_keys=True)
        digest = hashlib.sha256(digest + text.encode()).digest()
    return digest


def prefixes(messages: Sequence[Message]) -> dict[bytes, int]:
    """Return the digest of each beginning that ends with an answer, with its number of messages, longest first."""
    found: dict[bytes, int] = {}
    digest = ROOT
    for number, message in enumerate(messages, 1):
        digest = extend(digest, [message])
        if message["role"] == "assistant":
            found[digest] = number
    return dict(reversed(found.items()))


def common(held: Sequence[Message], given: Sequence[Message]) -> int:
    """Return the number of messages that two conversations have in common at their beginning."""
    pairs = zip(held, given, strict=False)
    return next(
        (n for n, (one, two) in enumerate(pairs) if canonical(one) != canonical(two)), min(len(held), len(given))
    )
