"""Hold the requests that a host serves at once over one paged cache, by the host's names for them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from loopserve.core.engine.forward import ForwardContext
from loopserve.core.engine.hosted import HostedTurn
from loopserve.core.engine.slots import Slots
from loopserve.core.guard.guard import Guard
from loopserve.core.kv.paged import BlockLayer, PagedPairs, Table

_KEPT = 1024  # figures of requests that have ended

_log = logging.getLogger("loopserve")


class PagedTurn(HostedTurn):
    """Hold one request. ``table.blocks`` are its blocks in order, int64; the host sets them before each pass."""

    def __init__(
        self, name: str, slots: Slots, guard: Guard, layers: Sequence[BlockLayer], tokens: Sequence[int], *, stored: int
    ) -> None:
        self.name, self.table = name, Table()
        super().__init__(slots, guard, [PagedPairs(each, self.table) for each in layers], tokens, stored=stored)

    @property
    def figures(self) -> dict[str, Any]:
        """Return the figures of the turn, and what was read through the table."""
        own = {"request": self.name, "known_tokens": self.prefill_end, "cached_tokens": self.stored}
        own |= {"decode_steps": self.stats.decode_steps, "output_tokens": self.stats.output_tokens}
        return own | self.stats.as_dict() | dict(self.table.counts)


class PagedRequests:
    """Hold the turns of all requests of one model. They share the policies and the cache, and no state."""

    def __init__(self, slots: Slots, guard: Guard) -> None:
        self._slots, self._guard = slots, guard
        self.layers = [BlockLayer() for _ in slots.by_layer]
        self.held: dict[str, PagedTurn | None] = {}  # None: dense to its end
        self._ended: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Return the figures of the last requests, those that have ended first."""
        return [*self._ended, *(each.figures for each in self.held.values() if each is not None)]

    def turn(self, name: str, stored: int, tokens: Callable[[], Sequence[int]]) -> PagedTurn | None:
        """Return the turn of a request that has ``stored`` pairs before its next pass, or None if it is served dense.

        A request that is new, or does not hold the pairs that its turn knows (it was preempted), begins anew with ``tokens``: all
        that are known of it.
        """
        held = self.held.get(name)
        if name not in self.held or (held is not None and held.seen != stored):
            self.drop([name])
            held = PagedTurn(name, self._slots, self._guard, self.layers, tokens(), stored=stored)
            self.held[name] = held
        return held

    def end_pass(self, turn: PagedTurn, context: ForwardContext) -> None:
        """End a turn's pass. A request whose share of it failed goes on without policies, dense."""
        try:
            turn.end_pass(context)
        except Exception as error:
            _log.warning("request %s goes on with dense attention: %s", turn.name, error)
            turn.stats.count("fault:other")
            self.drop([turn.name])
            self.held[turn.name] = None

    def drop(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Drop the states of requests that have ended or lost their pairs. Return their figures."""
        turns = [turn for name in names if (turn := self.held.pop(name, None)) is not None]
        found = [turn.figures for turn in turns]
        for turn in turns:
            turn.close()
        self._ended.extend(found)
        return found
