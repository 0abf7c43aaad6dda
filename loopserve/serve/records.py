"""Define the rows of the store: sessions and their turns."""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from loopserve.models.messages import Message


def new_id() -> str:
    """Return 32 hex digits. Ids of the API put a prefix before them (``chatcmpl-``, ``resp_``)."""
    return uuid4().hex


@dataclass(frozen=True)
class StoredTurn:
    """Hold one complete turn. The tokens of a conversation are those of the turns from the root to here, one after the other."""

    id: str
    session: str
    parent: str | None
    tenant: str
    model: str  # fingerprint of weights, tokenizer and template: the tokens mean nothing to another model
    stack: str  # digest of the stack that computed it
    digest: bytes  # of all messages from the root to the answer, see ``matching``
    messages: tuple[Message, ...]  # those that the turn adds before the answer
    answer: Message
    prompt_tokens: tuple[int, ...] = field(repr=False)
    output_tokens: tuple[int, ...] = field(repr=False)
    created: float
    finish_reason: str
    figures: dict[str, Any]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True)
class StoredSession:
    """Hold a session: a name for the turn that it is at. key: what the client calls it, if anything."""

    id: str
    tenant: str
    key: str | None
    head: str | None
    created: float
    updated: float


@dataclass(frozen=True)
class KVRow:
    """Hold the manifest row of the file with a turn's pairs. file: its path below the session directory."""

    turn: str
    file: str
    bytes: int
    sha256: str
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Path:
    """Hold the turns from the root of a conversation to one of its turns, in order; none for a new conversation."""

    turns: tuple[StoredTurn, ...] = ()

    @property
    def messages(self) -> list[Message]:
        return [message for turn in self.turns for message in (*turn.messages, turn.answer)]

    @property
    def tokens(self) -> list[int]:
        return [token for turn in self.turns for token in turn.tokens]

    @property
    def ids(self) -> list[str]:
        return [turn.id for turn in self.turns]

    @property
    def ends(self) -> list[int]:
        """Return the number of tokens at the end of each turn."""
        ends: list[int] = []
        for turn in self.turns:
            ends.append((ends[-1] if ends else 0) + len(turn.prompt_tokens) + len(turn.output_tokens))
        return ends

    @property
    def head(self) -> StoredTurn | None:
        return self.turns[-1] if self.turns else None


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Return token ids as little-endian 32-bit numbers."""
    packed = array.array("I", tokens)
    return packed.tobytes()


def unpack_tokens(data: bytes) -> tuple[int, ...]:
    """Return the ids that ``pack_tokens`` wrote."""
    packed = array.array("I")
    packed.frombytes(data)
    return tuple(packed)
