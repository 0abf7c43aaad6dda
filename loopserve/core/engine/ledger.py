"""Count the bytes that sessions hold and may come to hold, so that a limit is kept by admission and never by running out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from loopserve.core.engine.session import Session
from loopserve.core.errors import ConfigError
from loopserve.core.kv.buffers import ACTIVE_SLACK
from loopserve.core.kv.layer_cache import FIRST_CAPACITY
from loopserve.core.kv.selection import Retention

_STATE_SHARE = 0.5  # bytes of policy states beside those of the store: an upper bound for key codes of up to 8 bits


class Ledger:
    """Reserve bytes for the turns under way, and count what all other sessions hold."""

    def __init__(self, limit: int | None, element_bytes: int, sessions: Callable[[], Iterable[Session]]) -> None:
        """limit: bytes of stores, active sets and policy states of all sessions together; None = no limit. element_bytes: of one
        number of a key or value. sessions: the open ones, forks included, least recently used first.
        """
        if limit is not None and limit < 1:
            raise ConfigError(f"kv_memory must be at least one byte, got {limit}")
        self.limit = limit
        self._element_bytes, self._sessions = element_bytes, sessions
        self._reserved: WeakKeyDictionary[Session, int] = WeakKeyDictionary()

    @property
    def used(self) -> int:
        """Bytes reserved for the turns under way and held by all other sessions."""
        return sum(self._bytes(session) for session in self._sessions())

    def _bytes(self, session: Session) -> int:
        return max(self._reserved.get(session, 0), session.allocated_bytes)

    def needed(self, session: Session, new_tokens: int, max_new_tokens: int) -> int:
        """Return the most bytes that a session holds at any time of a turn.

        Counts what a buffer allocates beside its pairs, the copy made while one layer's buffer grows, a selection that is
        replaced by another of the same size, and recurrent states with the copies that an undo goes back to.
        """
        again = max((each.reads_again for each in session.slots.compressors.values()), default=0)
        length = len(session.tokens) + new_tokens + max(max_new_tokens, again)
        total, transient, whole = 0, 0, 0
        for policies, cache in zip(session.slots.by_layer, session.cache.layers, strict=True):
            pair = self._element_bytes * policies.spec.kv_heads * policies.spec.pair_width
            whole += length * pair
            held = cache.allocated_bytes
            grown = held * 3 // 2 if held < length * pair else held
            store = max(grown, (length + FIRST_CAPACITY) * pair) if policies.spec.reads is None else 0
            active = 0
            if policies.compressor is not None and not policies.compressor.capabilities.passive:
                pairs = min(policies.most_pairs or length, length) + max_new_tokens + ACTIVE_SLACK
                active = pairs * pair * 3 // 2
                if policies.retention is Retention.EVICT:
                    active += store  # the survivors that an undo goes back to
            total += store + active
            transient = max(transient, store + active)
        passive = all(each.capabilities.passive for each in session.slots.compressors.values())
        total += 2 * sum(policies.spec.state_bytes for policies in session.slots.by_layer) + session.copied_state_bytes
        return total + transient + (0 if passive else int(whole * _STATE_SHARE))

    def admit(self, session: Session, amount: int) -> bool:
        """Reserve bytes for a turn that begins, in place of what its session holds at rest; return whether they fit.

        Stores of other sessions at rest are released for it if that makes it fit, see ``make_space``.
        """
        if not self.make_space(amount, session):
            return False
        self._reserved[session] = amount
        return True

    def make_space(self, amount: int, session: Session) -> bool:
        """Release stores of sessions at rest, least recently used first, until ``amount`` bytes fit beside all but ``session``.

        Return whether they fit; if not, nothing is released. The next turns of released sessions compute the conversations anew.
        """
        if self.limit is None:
            return True
        others = [each for each in self._sessions() if each is not session]
        excess = sum(map(self._bytes, others)) + amount - self.limit
        idle = [each for each in others if each not in self._reserved and not each.busy and each.ended]
        if excess > sum(each.allocated_bytes for each in idle):
            return False
        for each in idle:
            if excess <= 0:
                break
            excess -= each.allocated_bytes
            each.release_store()
        return True

    def settle(self, session: Session) -> None:
        """End a turn's reservation: from here on what the session holds counts."""
        self._reserved.pop(session, None)
