"""Turn turns, sessions and manifests into rows of the store and back. What people wrote is sealed where there is a key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loopserve.serve.records import KVRow, StoredSession, StoredTurn, pack_tokens, unpack_tokens
from loopserve.serve.sealing import Sealer

TURN = (
    "id, session, parent, tenant, model, stack, digest, messages, answer, prompt_tokens, output_tokens, created, finish_reason, "
    "figures"
)
KV = "turn, file, bytes, sha256, manifest"


class Rows:
    """Write and read rows. Reading raises ValueError for one that does not open."""

    def __init__(self, sealer: Sealer) -> None:
        self.sealer = sealer

    def of_turn(self, turn: StoredTurn) -> tuple[Any, ...]:
        """Return the columns ``TURN``."""
        seal, text = self.sealer.seal, self.sealer.seal_text
        return (
            turn.id,
            turn.session,
            turn.parent,
            turn.tenant,
            turn.model,
            turn.stack,
            self.sealer.index(turn.digest),
            text(json.dumps(turn.messages), f"{turn.id} messages"),
            text(json.dumps(turn.answer), f"{turn.id} answer"),
            seal(pack_tokens(turn.prompt_tokens), f"{turn.id} prompt"),
            seal(pack_tokens(turn.output_tokens), f"{turn.id} output"),
            turn.created,
            turn.finish_reason,
            text(json.dumps(turn.figures), f"{turn.id} figures"),
        )

    def turn(self, row: Sequence[Any], digest: bytes | None = None) -> StoredTurn:
        """Return the turn of a row of ``TURN``. digest: the one that it was found by, since an index does not tell it."""
        (
            name,
            session,
            parent,
            tenant,
            model,
            stack,
            kept,
            messages,
            answer,
            prompt,
            output,
            created,
            finish,
            figures,
        ) = row
        seal = self.sealer
        return StoredTurn(
            name,
            session,
            parent,
            tenant,
            model,
            stack,
            digest or bytes(kept),
            tuple(json.loads(seal.open_text(messages, f"{name} messages"))),
            json.loads(seal.open_text(answer, f"{name} answer")),
            unpack_tokens(seal.open(bytes(prompt), f"{name} prompt")),
            unpack_tokens(seal.open(bytes(output), f"{name} output")),
            created,
            finish,
            json.loads(seal.open_text(figures, f"{name} figures")),
        )

    def messages(self, turn: str, kept: str | bytes) -> list[dict[str, str]]:
        """Return the messages in a row of a turn."""
        found: list[dict[str, str]] = json.loads(self.sealer.open_text(kept, f"{turn} messages"))
        return found

    def of_session(self, session: StoredSession) -> tuple[Any, ...]:
        """Return the columns of a session."""
        key = None if session.key is None else self.sealer.seal_text(session.key, f"{session.id} key")
        return (session.id, session.tenant, key, session.head, session.created, session.updated)

    def session(self, row: Sequence[Any]) -> StoredSession:
        """Return the session of a row."""
        name, tenant, key, head, created, updated = row
        opened = None if key is None else self.sealer.open_text(key, f"{name} key")
        return StoredSession(name, tenant, opened, head, created, updated)

    def kv(self, row: Sequence[Any]) -> KVRow:
        """Return the manifest of a row of ``KV``."""
        turn, file, size, sha256, manifest = row
        return KVRow(turn, file, size, sha256, json.loads(self.sealer.open_text(manifest, f"{turn} manifest")))
