"""Count the bytes that sessions hold and may come to hold, so that a limit is kept by admission and never by running out."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from loopserve.core.engine.session import Session
from loopserve.core.errors import ConfigError
from loopserve.core.kv.buffers import ACTIVE_SLACK
from loopserve.core.kv.cache import FIRST_CAPACITY
from loopserve.core.policy.interfaces import Retention

_STATE_SHARE = 0.5  # bytes of policy states beside those of the store, until a session of the stack has been measured


class Ledger:
    """Reserve bytes for the turns under way, and count those of sessions at rest."""

    def __init__(self, limit: int | None, pair_bytes: int) -> None:
        """limit: bytes of stores, active sets and policy states of all sessions together; None = no limit. pair_bytes: of one key
        and value of one head of one token.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"kv_memory must be at least one byte, got {limit}")
        self.limit = limit
        self._pair_bytes = pair_bytes
        self._held: WeakKeyDictionary[Session, int] = WeakKeyDictionary()  # least recently used first
        self._reserved: WeakKeyDictionary[Session, int] = WeakKeyDictionary()

    @property
    def used(self) -> int:
        """Bytes held by sessions at rest and reserved for the turns under way."""
        return sum(self._held.values()) + sum(self._reserved.values())

    def needed(self, session: Session, new_tokens: int, max_new_tokens: int) -> int:
        """Return the most bytes that a session holds at any time of a turn.

        Counts what a buffer allocates beside its pairs, the copy made while one layer's buffer grows, and a selection that is
        replaced by another of the same size.
        """
        length = len(session.tokens) + new_tokens + max_new_tokens
        total, transient, whole = 0, 0, 0
        for policies, cache in zip(session.slots.by_layer, session.cache.layers, strict=True):
            pair = self._pair_bytes * policies.spec.kv_heads * policies.spec.head_dim
            whole += length * pair
            held = cache.allocated_bytes
            grown = held * 3 // 2 if held < length * pair else held
            store = max(grown, (length + FIRST_CAPACITY) * pair)
            active = 0
            if policies.compressor is not None and not policies.compressor.capabilities.passive:
                pairs = min(policies.most_pairs or length, length) + max_new_tokens + ACTIVE_SLACK
                active = pairs * pair * 3 // 2
                if policies.retention is Retention.EVICT:
                    active += store  # the survivors that an undo goes back to
            total += store + active
            transient = max(transient, store + active)
        passive = all(each.capabilities.passive for each in session.slots.compressors.values())
        return total + transient + (0 if passive else int(whole * _STATE_SHARE))

    def admit(self, session: Session, amount: int) -> bool:
        """Reserve bytes for a turn that begins, in place of what its session holds at rest; return whether they fit.

        Stores of other sessions at rest are released for it, least recently used first: their next turns compute the
        conversations anew.
        """
        for other in list(self._held):
            if self._fits(session, amount):
                break
            if other is not session and not other.busy:
                other.release_store()
                self._held.pop(other, None)
        if not self._fits(session, amount):
            return False
        self._held.pop(session, None)
        self._reserved[session] = amount
        return True

    def settle(self, session: Session) -> None:
        """End a turn's reservation: count what the session holds at rest. It becomes the most recently used one."""
        self._reserved.pop(session, None)
        self._held.pop(session, None)
        if session.allocated_bytes:
            self._held[session] = session.allocated_bytes

    def _fits(self, session: Session, amount: int) -> bool:
        return self.limit is None or self.used - self._held.get(session, 0) + amount <= self.limit
