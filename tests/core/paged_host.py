"""A host in miniature: pairs in shuffled blocks, in an order of numbers of its own, for turns that loopserve's policies rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve import load_stack
from loopserve.core.engine.attention import attend
from loopserve.core.engine.forward import ForwardContext, LayerCall
from loopserve.core.engine.hosted import HostedTurn, attend_hosted, require_hosted
from loopserve.core.engine.session import Session
from loopserve.core.engine.slots import Slots
from loopserve.core.engine.turn import ask_compressors
from loopserve.core.guard.guard import Guard
from loopserve.core.kv.paged import BlockLayer, PagedPairs, Table
from loopserve.core.policy.interfaces import Phase
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.kernels.dense_attention import dense_attention

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 2, 4, 2, 16, 8
SPECS = [LayerSpec(each, LayerType.FULL, HEADS, KV_HEADS, DIM, repeatable=False) for each in range(LAYERS)]
Pass = list[tuple[Tensor, Tensor, Tensor]]  # queries, keys and values of each layer

ORDERS = ("rows", "columns", "shuffled")
PAIRS = "pairs"  # each row of a block is a key and its value, so that kernels can read it in place


def order(name: str) -> Tensor:
    """Where the numbers of a block's keys lie: ``[BLOCK, DIM]``."""
    numbers = torch.arange(BLOCK * DIM)
    if name == "columns":
        return numbers.view(DIM, BLOCK).t().contiguous()
    if name == "shuffled":
        numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(3))]
    return numbers.view(BLOCK, DIM)


def drawn(tokens: int, seed: int) -> Pass:
    source = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(HEADS, tokens, DIM, generator=source),
            torch.randn(KV_HEADS, tokens, DIM, generator=source),
            torch.randn(KV_HEADS, tokens, DIM, generator=source),
        )
        for _ in range(LAYERS)
    ]


class Host:
    """Store pairs in blocks and run turns over them."""

    def __init__(
        self,
        order_of_keys: str = "columns",
        blocks: int = 64,
        guard: Guard | None = None,
        layers: list[BlockLayer] | None = None,
    ) -> None:
        self.pairs = order_of_keys == PAIRS
        self.places = order(order_of_keys), order("rows")
        self.caches = [self._cache(blocks) for _ in range(LAYERS)]
        self.layers = layers or [BlockLayer() for _ in range(LAYERS)]
        self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.guard = guard or Guard(on_fault="dense")

    def _bind(self, index: int) -> None:
        """Show a layer its cache, when it is first called, as vLLM does."""
        if self.pairs:
            self.layers[index].bind_rows(self.caches[index])
            return
        self.layers[index].bind(
            self.caches[index], lambda keys, values, one: self._write(one, keys, values, list(range(BLOCK)))
        )

    def _cache(self, blocks: int) -> Tensor:
        if self.pairs:  # the heads of a token side by side, as some engines have it
            return torch.zeros(blocks, BLOCK, KV_HEADS, 2 * DIM).transpose(1, 2)
        return torch.zeros(blocks, KV_HEADS, BLOCK, 2 * DIM)

    def _write(self, cache: Tensor, keys: Tensor, values: Tensor, slots: Sequence[int]) -> None:
        """Write pairs ``[T, Hkv, D]`` at slots."""
        if self.pairs:
            at = torch.tensor(slots)
            cache[at // BLOCK, :, at % BLOCK] = torch.cat([keys, values], dim=-1)
            return
        halves = cache.view(len(cache), cache.shape[1], 2, -1)
        for row, slot in enumerate(slots):
            for half, part in enumerate((keys, values)):
                halves[slot // BLOCK][:, half, self.places[half][slot % BLOCK]] = part[row]

    def begin(self, slots: Slots, tokens: int, *, like: HostedTurn | None = None, stored: int = 0) -> HostedTurn:
        """Begin a turn. like: the first ``stored`` tokens are in this turn's blocks."""
        table = Table()
        if like is not None:
            table.blocks = table_of(like).blocks[: stored // BLOCK]
        stores = [PagedPairs(each, table) for each in self.layers]
        return HostedTurn(slots, self.guard, stores, list(range(tokens)), stored=stored)

    def run(self, turn: HostedTurn, given: Pass) -> list[Tensor | None]:
        """Run one pass to its end, and return what each layer's policies made of it; None where it is dense."""
        context, found = self.compute(turn, given)
        turn.end_pass(context)
        return found

    def compute(self, turn: HostedTurn, given: Pass) -> tuple[ForwardContext, list[Tensor | None]]:
        tokens, table = given[0][0].shape[1], table_of(turn)
        while len(table.blocks) * BLOCK < turn.seen + tokens:
            table.blocks = torch.cat([table.blocks, torch.tensor([self.free.pop()])])
        places = torch.arange(turn.seen, turn.seen + tokens)
        slots = table.blocks[places // BLOCK] * BLOCK + places % BLOCK
        context = turn.begin_pass(tokens)
        found: list[Tensor | None] = []
        for index, (queries, keys, values) in enumerate(given):
            self._bind(index)
            self._write(self.caches[index], keys.transpose(0, 1), values.transpose(0, 1), slots.tolist())
            self.layers[index].written(slots)
            context.append(index, keys, values)
            found += attend_hosted([context], LayerCall(index, DIM**-0.5), [queries])
        return context, found


def table_of(turn: HostedTurn) -> Table:
    store = turn.session.cache.layers[0].store
    assert isinstance(store, PagedPairs)
    return store.table


def slots_of(stack: object) -> Slots:
    return require_hosted(load_stack(stack), SPECS)  # type: ignore[arg-type]


class Own:
    """The same turn by loopserve itself."""

    def __init__(self, slots: Slots, tokens: int) -> None:
        self.session, self.end = Session(slots, Guard()), tokens
        self.session.begin_turn(list(range(tokens)))

    def run(self, given: Pass) -> list[Tensor]:
        start, tokens = self.session.cache.seen, given[0][0].shape[1]
        end = start + tokens
        phase = Phase.PREFILL if end <= self.end else Phase.DECODE
        self.session.enter(phase)
        context = ForwardContext(
            self.session, phase, [0] * tokens, torch.arange(start, end), stored_after=end, final=end >= self.end
        )
        found = []
        for index, (queries, keys, values) in enumerate(given):
            context.append(index, keys, values)
            found += attend([context], LayerCall(index, DIM**-0.5), [queries])
        ask_compressors(context)
        return found

    def dense(self, layer: int, queries: Tensor) -> Tensor:
        store = self.session.cache.layers[layer].store
        assert store is not None
        return dense_attention(queries, store.keys, store.values, scaling=DIM**-0.5)[0]
