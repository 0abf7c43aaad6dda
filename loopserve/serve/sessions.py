"""List, show, fork, undo and delete the sessions of a tenant; forget those that rest too long."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from loopserve.serve.conversations import Conversations
from loopserve.serve.errors import invalid, not_found
from loopserve.serve.records import Path, StoredSession, new_id

TITLE_CHARACTERS = 80


class Sessions:
    """Work on sessions as a whole. A session is a name for a turn: fork and undo move names, and compute nothing."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations
        self._store = conversations.store

    async def list(self, tenant: str, limit: int) -> list[dict[str, Any]]:
        """Return the latest sessions of a tenant as the API shows them, with title and number of turns."""

        def work() -> list[dict[str, Any]]:
            found = self._store.sessions(tenant, limit)
            titles = [("", 0) if each.head is None else self._store.title(tenant, each.head) for each in found]
            return [
                as_json(each) | {"title": title.strip().partition("\n")[0][:TITLE_CHARACTERS], "turns": turns}
                for each, (title, turns) in zip(found, titles, strict=True)
            ]

        return await self._conversations.on_disk(work)

    async def show(self, tenant: str, session: str) -> tuple[StoredSession, Path]:
        """Return a session and the turns that lead to where it is. ApiError (404) if the tenant has none of this id."""
        return await self._conversations.on_disk(lambda: self._shown(tenant, session))

    def _shown(self, tenant: str, session: str) -> tuple[StoredSession, Path]:
        found = self._store.session(tenant, session)
        if found is None:
            raise not_found("session", session, "session_not_found")
        path = Path() if found.head is None else self._store.path(tenant, found.head)
        return found, path or Path()

    async def fork(self, tenant: str, session: str, turn: str | None = None) -> StoredSession:
        """Return a new session at the same turn, or at an earlier one of its turns."""

        def work() -> StoredSession:
            found, path = self._shown(tenant, session)
            if turn is not None and turn not in path.ids:
                raise not_found("turn", turn, "turn_not_found")
            now = time.time()
            other = StoredSession(new_id(), tenant, None, turn or found.head, now, now)
            self._store.put_session(other)
            return other

        return await self._conversations.on_disk(work)

    async def undo(self, tenant: str, session: str) -> StoredSession:
        """Move a session back by one turn. ApiError (400) if it has none."""

        def work() -> StoredSession:
            found, path = self._shown(tenant, session)
            if path.head is None:
                raise invalid("nothing to undo: the session has no turn")
            moved = replace(found, head=path.head.parent, updated=time.time())
            self._store.put_session(moved)
            return moved

        return await self._conversations.on_disk(work)

    async def remove(self, tenant: str, session: str) -> None:
        """Delete a session: its turns, as far as no other session goes through them, their files, their pairs in memory."""
        conversations = self._conversations

        def work() -> list[str]:
            self._shown(tenant, session)
            gone = self._store.remove_session(tenant, session)
            conversations.files.remove(gone)
            return gone

        gone = await conversations.on_disk(work)
        await conversations.worker.acall(lambda: conversations.live.drop(set(gone)))

    async def expire(self) -> int:
        """Delete the sessions that rest for longer than the settings allow; return how many."""
        limit = self._conversations.settings.session_ttl_s
        if limit is None:
            return 0
        expired = await self._conversations.on_disk(lambda: self._store.expired(limit))
        expired = [each for each in expired if each.id not in self._conversations.busy_sessions]
        for each in expired:
            await self.remove(each.tenant, each.id)
        return len(expired)


def as_json(session: StoredSession, path: Path | None = None) -> dict[str, Any]:
    """Return a session as the API shows it, with its turns if a path is given."""
    shown: dict[str, Any] = {
        "id": session.id,
        "object": "session",
        "key": session.key,
        "head": session.head,
        "created": session.created,
        "updated": session.updated,
    }
    if path is None:
        return shown
    turns = [
        {
            "id": turn.id,
            "parent": turn.parent,
            "messages": list(turn.messages),
            "answer": turn.answer,
            "prompt_tokens": len(turn.prompt_tokens),
            "output_tokens": len(turn.output_tokens),
            "finish_reason": turn.finish_reason,
            "created": turn.created,
            "figures": turn.figures,
        }
        for turn in path.turns
    ]
    return shown | {"tokens": len(path.tokens), "turns": turns}
