"""Hold the requests that a host serves at once over one paged cache, by the host's names for them.

For every pass of its model the host asks for the rows of its batch, and has each layer attend::

    with requests.running():
        rows = requests.begin(names, starts, lengths, table, block_size, known)
        for layer in layers:
            sparse = requests.attend(LayerCall(layer, scaling), queries, keys, values)
            requests.fill(output, queries, sparse, dense)   # the host's kernel computes the other requests
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loopserve.core.engine.forward import ForwardContext, LayerCall
from loopserve.core.engine.hosted import HostedTurn, attend_hosted
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


def summary(figures: dict[str, Any]) -> str:
    """Return the most important figures of a turn in one line."""
    return (
        "{known_tokens} tokens, {cached_tokens} of them cached; {output_tokens} outputs; prefill density {prefill_tile_density}, "
        "attended fraction {attended_fraction}, {faults} faults"
    ).format_map(figures)


class Row(NamedTuple):
    """Hold one request's part of a batch: its number in it and its tokens. Without a turn the host serves it dense."""

    number: int
    tokens: slice
    length: int
    turn: PagedTurn | None
    context: ForwardContext | None


class PagedRequests:
    """Hold the turns of all requests of one model. They share the policies and the cache, and no state.

    rows: of the pass under way, in the order of its batch; empty before its ``begin``. shared: what the host's layers have in
    common in it, by keys of their own. layers: where to read the cache.
    """

    current: ClassVar[PagedRequests | None] = None  # whose pass is under way in this process

    def __init__(self, slots: Slots, guard: Guard) -> None:
        self._slots, self._guard = slots, guard
        self.layers = [BlockLayer() for _ in slots.by_layer]
        self.held: dict[str, PagedTurn | None] = {}  # None: dense to its end
        self._ended: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self.rows: list[Row] = []
        self.shared: dict[Any, Any] = {}

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

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold a pass under way. Its end lets the compressors answer.

        If the host fails in it, the turns that took part end: some layers have its pairs, others have not.
        """
        self.rows, self.shared, PagedRequests.current = [], {}, self
        try:
            yield
        except BaseException:
            self.drop([row.turn.name for row in self.rows if row.turn is not None])
            raise
        finally:
            PagedRequests.current = None
        for row in self.rows:
            if row.turn is not None and row.context is not None:
                self.end_pass(row.turn, row.context)

    def begin(
        self,
        names: Sequence[str],
        starts: Sequence[int],
        lengths: Sequence[int],
        table: Tensor,
        block_size: int,
        known: Callable[[str], Sequence[int]],
    ) -> list[Row]:
        """Begin a pass of these requests, and return them in the order of the batch.

        starts: where the tokens of each begin in the batch, and the end of the last. lengths: their pairs after the pass. table int
        ``[requests, n]``: their blocks. known: returns the tokens known of a request by its name.
        """
        for number, name in enumerate(names):
            tokens, length = slice(starts[number], starts[number + 1]), lengths[number]
            new = tokens.stop - tokens.start
            turn, context = self.turn(name, length - new, partial(known, name)), None
            if turn is not None:
                turn.table.blocks = table[number, : -(-length // block_size)].long()
                context = turn.begin_pass(new)
            self.rows.append(Row(number, tokens, new, turn, context))
        return self.rows

    def attend(self, call: LayerCall, queries: Tensor, keys: Tensor, values: Tensor) -> dict[int, Tensor]:
        """Return one layer's output ``[Hq, T, D]`` of each request that does not attend to every pair, by number in the batch.

        queries, keys, values ``[tokens, heads, D]``: of the whole batch, rotated and stored. The host computes the other requests.
        """
        asked = [(row.number, row.tokens, row.context) for row in self.rows if row.context is not None]
        for _, tokens, context in asked:
            context.append(call.layer, keys[tokens].transpose(0, 1), values[tokens].transpose(0, 1))
        own = [queries[tokens].transpose(0, 1).contiguous() for _, tokens, _ in asked]
        found = attend_hosted([context for *_, context in asked], call, own)
        return {number: each for (number, *_), each in zip(asked, found, strict=True) if each is not None}

    def fill(
        self,
        output: Tensor,
        queries: Tensor,
        sparse: Mapping[int, Tensor],
        dense: Callable[[list[Row], Tensor, Tensor], None],
    ) -> None:
        """Write one layer's output ``[tokens, Hq, D]`` of the batch: what ``attend`` returned, and that of the other requests.

        dense: writes the output of some requests; takes their rows, and queries and output of their tokens alone, one behind the
        other.
        """
        others = [row for row in self.rows if row.number not in sparse]
        if others:
            packed = torch.cat([queries[row.tokens] for row in others])
            found = torch.empty_like(packed)
            dense(others, packed, found)
            for row, each in zip(others, found.split([row.length for row in others]), strict=True):
                output[row.tokens] = each
        for number, each in sparse.items():
            output[self.rows[number].tokens] = each.transpose(0, 1)

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
