"""Hold the sessions whose pairs are in memory, by the turn they rest at. Used by the model's thread only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.ledger import Ledger
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import TurnStats
from loopserve.core.stack.stack import PolicyStack
from loopserve.serve.kv_files import LoadedPairs
from loopserve.serve.records import Path


@dataclass(eq=False)
class Resting:
    """Hold a session at rest, with the turns that its tokens are made of."""

    session: Session
    stack: str
    turns: list[str]
    ends: list[int]  # tokens at the end of each turn

    def shared(self, path: Path) -> int:
        """Return the tokens that this session can give to a path: whole turns that both have, as far as they are computed."""
        same = 0
        for mine, wanted in zip(self.turns, path.ids, strict=False):
            if mine != wanted:
                break
            same += 1
        return min(self.ends[same - 1], self.session.cache.seen) if same else 0


class LiveSessions:
    """Give sessions for paths and take them back."""

    def __init__(self, engine: TokenEngine, ledger: Callable[[], Ledger]) -> None:
        """ledger: gives the one in force, which a restart of the engine replaces."""
        self._engine, self._ledger = engine, ledger
        self._resting: list[Resting] = []

    def __len__(self) -> int:
        return len(self._resting)

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes of all sessions of the engine, those under way included."""
        return sum(each.allocated_bytes for each in self._engine.sessions)

    def best(self, path: Path, stack: PolicyStack) -> int:
        """Return the tokens of a path that are in memory."""
        return max((each.shared(path) for each in self._of(stack)), default=0)

    def take(self, path: Path, stack: PolicyStack, loaded: LoadedPairs | None = None) -> Session:
        """Return a session with the tokens of a path, which holds as many of their pairs as can be had.

        The session that rests at the path's end is given itself; else a fork of one that went on from there, or shares a part of
        it. loaded: what the files hold of the path. The caller gives the session back with ``put``, or closes it.
        """
        tokens = path.tokens
        best = max(self._of(stack), key=lambda each: each.shared(path), default=None)
        held = best.shared(path) if best is not None else 0
        if loaded is not None and loaded.tokens > held:
            session = self._open(path, stack)
            if self._ledger().make_space(loaded.nbytes * 3 // 2, session):
                loaded.restore(session, self._engine.model.device)
            return session
        if best is None or held == 0:
            return self._open(path, stack)
        if best.turns == path.ids:
            self._resting.remove(best)
            return best.session
        size = best.session.allocated_bytes
        if not self._ledger().make_space(2 * size, best.session):
            return self._open(path, stack)
        session = best.session.fork()
        session.go_back(held)
        session.tokens.extend(tokens[len(session.tokens) :])
        return session

    def put(self, session: Session, path: Path, stack: PolicyStack) -> None:
        """Take a session that rests at the end of a path."""
        if session.closed or not path.turns:
            session.close()
            return
        self._resting.append(Resting(session, stack.digest, path.ids, path.ends))
        self._sweep()

    def drop(self, turns: set[str]) -> None:
        """Close the sessions that go through any of these turns."""
        for each in [each for each in self._resting if turns.intersection(each.turns)]:
            each.session.close()
            self._resting.remove(each)

    def close(self) -> None:
        """Close every session."""
        for each in self._resting:
            each.session.close()
        self._resting = []

    def _of(self, stack: PolicyStack) -> list[Resting]:
        self._sweep()
        return [each for each in self._resting if each.stack == stack.digest]

    def _sweep(self) -> None:
        """Forget sessions whose pairs were released: they hold nothing that the store does not."""
        self._resting = [each for each in self._resting if each.session.cache.seen]

    def _open(self, path: Path, stack: PolicyStack) -> Session:
        session = self._engine.session(stack)
        session.tokens.extend(path.tokens)
        session.turns.extend(TurnStats(number) for number in range(len(path.turns)))
        return session
