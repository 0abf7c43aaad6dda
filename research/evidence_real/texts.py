"""Natural text of three kinds: prose, technical writing and code, two texts of each.

Prose is kept beside this file. Technical writing is the language reference that comes with Python (``pydoc_data.topics``), code is
Python's standard library; both depend on Python's version, so results hold a digest of the text that they were measured on.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from importlib import resources
from typing import Any

from loopserve.core.errors import ConfigError

KINDS = ("prose", "technical", "code")
TEXTS: dict[str, tuple[str, str]] = {
    "prose": ("prose_1", "prose_2"),
    "technical": ("specialnames", "compound"),
    "code": ("argparse", "asyncio.base_events"),
}
REQUEST = "Continue this text.\n\n"


def text(kind: str, number: int) -> str:
    """Return a text of a kind, at least 8,000 tokens long. ConfigError for one that does not exist."""
    if kind not in TEXTS or not 0 <= number < len(TEXTS[kind]):
        raise ConfigError(
            f"there is no text {number} of the kind {kind!r}: {len(KINDS)} kinds, {', '.join(KINDS)}, have two each"
        )
    name = TEXTS[kind][number]
    if kind == "prose":
        return (resources.files(__package__) / "texts" / f"{name}.txt").read_text("utf-8")
    if kind == "technical":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return topics[name]
    return inspect.getsource(importlib.import_module(name))


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def continued(tokenizer: Any, content: str, tokens: int, forced: int) -> tuple[list[int], list[int]]:
    """Return a prompt of ``tokens`` tokens that gives the beginning of a text to continue, and the ``forced`` tokens after it.

    The prompt is one turn of the model's chat template. ConfigError for a text that is too short.
    """
    before, after = template_around(tokenizer, REQUEST)
    ids = tokenizer.encode(content, add_special_tokens=False, verbose=False)
    given = tokens - len(before) - len(after)
    if given < 1 or given + forced > len(ids):
        raise ConfigError(f"the text has {len(ids)} tokens, {given + forced} are needed")
    return [*before, *ids[:given], *after], ids[given : given + forced]


def template_around(tokenizer: Any, request: str) -> tuple[list[int], list[int]]:
    """Return the template's tokens before and after the text of a first message that begins with ``request``."""
    before, after, _ = template_of_turns(tokenizer, request)
    return before, after


def template_of_turns(tokenizer: Any, request: str) -> tuple[list[int], list[int], list[int]]:
    """Return the template's tokens before a first message's text, after it, and from an answer's text to the next message's.

    Without a chat template they are the tokens that begin every text of the model, and none.
    """
    if tokenizer.chat_template is None:
        return list(tokenizer.encode("")), [], []
    marker = "\u2042"
    user, assistant = {"role": "user", "content": request + marker}, {"role": "assistant", "content": marker}
    spoken = tokenizer.apply_chat_template([user, assistant, user], add_generation_prompt=True, tokenize=False)
    before, after, between, _ = spoken.split(marker)
    first, second, third = (tokenizer.encode(part, add_special_tokens=False) for part in (before, after, between))
    return first, second, third
