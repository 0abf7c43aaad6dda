"""Define what a request asks for, and the turn that it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loopserve.core.engine.sampling import LogitsProcessor, SamplingConfig
from loopserve.models.messages import Message
from loopserve.serve.records import Path, StoredSession
from loopserve.serve.structured import Grammar


@dataclass(frozen=True)
class Ask:
    """Hold what a request asks for.

    messages: the whole conversation, or with ``previous`` what follows that turn. previous: id of a turn. session: id of a session.
    key: the client's own name for the conversation. tokens: a prompt in place of messages; nothing of it is kept.
    store: False keeps the turn in memory only, so that the conversation can go on until the server ends. attention_map: count which
    parts of the conversation each step attends to.
    """

    tenant: str
    messages: Sequence[Message]
    sampling: SamplingConfig
    previous: str | None = None
    session: str | None = None
    key: str | None = None
    stack: str | None = None  # name of an allowed stack; None: the server's
    n: int = 1
    tokens: Sequence[int] | None = None
    store: bool = True
    attention_map: bool = False
    logits_processors: Sequence[LogitsProcessor] = ()
    grammar: Grammar | None = None  # what the answer must be
    reads_calls: bool = False  # the answer may hold tool calls
    parallel_calls: bool = True  # more than one


@dataclass
class Match:
    """Hold the path that a request goes on from, the messages that it adds, and why no more of it is known."""

    path: Path
    messages: list[Message]
    session: StoredSession
    reason: str = ""
