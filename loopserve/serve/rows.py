"""Turn turns, sessions and manifests into rows of the store and back. What people wrote is sealed where there is a key."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from typing import Any

from loopserve.models.messages import Message
from loopserve.serve.records import KVRow, StoredSession, StoredTurn, pack_tokens, unpack_tokens
from loopserve.serve.sealing import Sealer

_log = logging.getLogger("loopserve.serve")
TURN = (
    "id, session, parent, tenant, model, stack, digest, messages, answer, prompt_tokens, output_tokens, created, finish_reason, "
    "figures"
)
_MESSAGES = TURN.split(", ").index("messages")
KV = "turn, file, bytes, sha256, manifest"
DAMAGE = (ValueError, TypeError, KeyError)  # what reading a row raises if it is not as it was written
_MANIFEST = {
    "start": int,
    "end": int,
    "rotation": int,
    "fingerprint": str,
    "tokens": str,
    "header": str,
    "checksums": dict,
    "states": dict,
}


def is_cache_file(file: object) -> bool:
    """Return whether a name is that of a file two folders below the session directory."""
    parts = file.split("/") if isinstance(file, str) else []
    return len(parts) == 3 and all(parts) and not {".", ".."} & set(parts)


def read_text(data: bytes) -> str | bytes:
    """Return a text of the database. One that is not UTF-8 stays as it is, so that its row is damaged and not the whole query."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


class Rows:
    """Write and read rows. Reading raises one of ``DAMAGE`` for a row that is not as it was written."""

    def __init__(self, sealer: Sealer) -> None:
        self.sealer = sealer

    def of_turn(self, turn: StoredTurn) -> tuple[Any, ...]:
        """Return the columns ``TURN``."""
        seal, text = self.sealer.seal, self.sealer.seal_text
        place = _place(turn.id, turn.session, turn.parent, turn.tenant, turn.model, turn.stack)
        return (
            turn.id,
            turn.session,
            turn.parent,
            turn.tenant,
            turn.model,
            turn.stack,
            self.sealer.index(turn.digest),
            text(json.dumps(turn.messages), f"{place} messages"),
            text(json.dumps(turn.answer), f"{place} answer"),
            seal(_with_checksum(turn.prompt_tokens), f"{place} prompt"),
            seal(_with_checksum(turn.output_tokens), f"{place} output"),
            turn.created,
            turn.finish_reason,
            text(json.dumps(turn.figures), f"{place} figures"),
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
            _,
            answer,
            prompt,
            output,
            created,
            finish,
            figures,
        ) = row
        seal, place = self.sealer, _place(*row[:6])
        said, noted = (
            json.loads(seal.open_text(each, f"{place} {what}"))
            for each, what in ((answer, "answer"), (figures, "figures"))
        )
        if not _is_message(said) or not isinstance(noted, dict):
            raise ValueError("its answer or its figures are of another form")
        return StoredTurn(
            name,
            session,
            parent,
            tenant,
            model,
            stack,
            digest or bytes(kept),
            tuple(self.messages(row)),
            said,
            _checked(seal.open(bytes(prompt), f"{place} prompt")),
            _checked(seal.open(bytes(output), f"{place} output")),
            created,
            finish,
            noted,
        )

    def messages(self, row: Sequence[Any]) -> list[Message]:
        """Return the messages in a row of ``TURN``."""
        found: list[Message] = json.loads(self.sealer.open_text(row[_MESSAGES], f"{_place(*row[:6])} messages"))
        if not isinstance(found, list) or not all(map(_is_message, found)):
            raise ValueError("its messages are of another form")
        return found

    def of_session(self, session: StoredSession) -> tuple[Any, ...]:
        """Return the columns of a session."""
        key = None if session.key is None else self.sealer.seal_text(session.key, f"{session.tenant} {session.id} key")
        return (session.id, session.tenant, key, session.head, session.created, session.updated)

    def session(self, row: Sequence[Any]) -> StoredSession:
        """Return the session of a row. One whose name cannot be read is without a name: it is still listed, and expires."""
        name, tenant, key, head, created, updated = row
        opened = None
        try:
            opened = None if key is None else self.sealer.open_text(key, f"{tenant} {name} key")
        except DAMAGE as error:
            _log.error("the name of session %s cannot be read: %s", name, error)
        return StoredSession(name, tenant, opened, head, created, updated)

    def kv(self, row: Sequence[Any]) -> KVRow:
        """Return the manifest of a row of ``KV``."""
        turn, file, size, sha256, kept = row
        manifest = json.loads(self.sealer.open_text(kept, f"{file} {turn}"))
        if not is_cache_file(file) or not isinstance(size, int) or not isinstance(sha256, str):
            raise ValueError("its file, size or sha256 is of another form")
        if not isinstance(manifest, dict) or any(type(manifest[name]) is not kind for name, kind in _MANIFEST.items()):
            raise ValueError("its manifest is of another form")
        return KVRow(turn, file, size, sha256, manifest)


def _place(turn: str, session: str, parent: str | None, tenant: str, model: str, stack: str) -> str:
    """Return where the parts of a turn are sealed: its first six columns, so that none of them can be changed."""
    return f"{tenant} {session} {parent} {turn} {model} {stack}"


def _with_checksum(tokens: Sequence[int]) -> bytes:
    """Return packed tokens with a CRC-32: a flipped bit would be another token, or one that the model does not have."""
    packed = pack_tokens(tokens)
    return packed + zlib.crc32(packed).to_bytes(4, "little")


def _checked(data: bytes) -> tuple[int, ...]:
    """Return the tokens that ``_with_checksum`` packed. Raises ValueError if they are damaged."""
    packed, checksum = data[:-4], data[-4:]
    if zlib.crc32(packed).to_bytes(4, "little") != checksum:
        raise ValueError("the checksum of its tokens is another one")
    return unpack_tokens(packed)


def _is_message(found: object) -> bool:
    return isinstance(found, dict) and isinstance(found.get("role"), str) and isinstance(found.get("content"), str)
