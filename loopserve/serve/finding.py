"""Find the turn that a request goes on from, always among those of its tenant."""

from __future__ import annotations

import hashlib
import time

from loopserve.models.messages import Message
from loopserve.serve.ask import Ask, Match
from loopserve.serve.errors import not_found
from loopserve.serve.matching import common, prefixes
from loopserve.serve.records import Path, StoredSession, new_id
from loopserve.serve.store import Store

NEW = "new conversation"


def find(store: Store, model: str, ask: Ask) -> Match:
    """Return the longest stored path that a request goes on from: by the turn or session that it names, else by its messages.

    model: fingerprint; turns of other models are not looked at. Raises ApiError (404) for ids that are not known.
    """
    messages = list(ask.messages)
    if ask.tokens is not None:
        return nothing(ask, "a prompt without a conversation")
    if ask.previous is not None:
        return _after(store, model, ask, messages)
    named = _named(store, ask)
    digests = prefixes(messages)
    for turn in store.find(ask.tenant, model, list(digests), named.id if named else None):
        path, size = store.path(ask.tenant, turn.id), digests[turn.digest]
        if path is None or len(path.messages) != size or common(path.messages, messages) < size:
            continue  # digests only index
        session = named or store.session(ask.tenant, turn.session)
        if named is None and session is not None and session.head != turn.id:
            session = None  # the conversation went on otherwise: a branch is a session of its own
        return Match(path, messages[size:], session or _new_session(ask.tenant))
    return Match(Path(), messages, named or _new_session(ask.tenant), _difference(store, ask, named, messages))


def nothing(ask: Ask, reason: str) -> Match:
    """Return the match of a request that goes on from nothing. reason: why."""
    return Match(Path(), [] if ask.tokens is not None else list(ask.messages), _new_session(ask.tenant), reason)


def _after(store: Store, model: str, ask: Ask, messages: list[Message]) -> Match:
    assert ask.previous is not None
    path = store.path(ask.tenant, ask.previous)
    if path is None or path.head is None or path.head.model != model:
        raise not_found("previous response", ask.previous, "previous_response_not_found")
    if ask.session is not None:
        return Match(path, messages, _named(store, ask) or _new_session(ask.tenant))
    session = store.session(ask.tenant, path.head.session)
    if session is None or session.head != path.head.id:
        session = _new_session(ask.tenant)
    return Match(path, messages, session)


def _named(store: Store, ask: Ask) -> StoredSession | None:
    """Return the session that a request names, a new one for a name that is not known yet; None if it names none."""
    if ask.session is not None:
        found = store.session(ask.tenant, ask.session)
        if found is None:
            raise not_found("conversation", ask.session, "conversation_not_found")
        return found
    if ask.key is None:
        return None
    name = named_session(ask.tenant, ask.key)
    found = store.session(ask.tenant, ask.key) or store.session(ask.tenant, name)
    return found or _new_session(ask.tenant, name, ask.key)


def named_session(tenant: str, key: str) -> str:
    """Return the id of the session that a client names: the same for simultaneous requests."""
    return hashlib.sha256(f"{tenant}\n{key}".encode()).hexdigest()[:32]


def _new_session(tenant: str, name: str | None = None, key: str | None = None) -> StoredSession:
    now = time.time()
    return StoredSession(name or new_id(), tenant, key, None, now, now)


def _difference(store: Store, ask: Ask, named: StoredSession | None, messages: list[Message]) -> str:
    if named is None or named.head is None:
        return NEW
    held = store.path(ask.tenant, named.head)
    return NEW if held is None else f"message {common(held.messages, messages)} differs"
