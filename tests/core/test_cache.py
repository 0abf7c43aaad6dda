"""The cache keeps every promise over random sequences of operations, checked against a plain list of pairs per head."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loopserve.core.errors import CacheError, PolicyError
from loopserve.core.kv.cache import KVCache
from loopserve.core.kv.layer_cache import LayerCache
from loopserve.core.kv.selection import KVSelection, Retention

HEADS, WIDTH = 2, 3


def pairs(positions: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that say which head and position they belong to."""
    keys = torch.tensor([[[head * 1000.0 + p] * WIDTH for p in positions] for head in range(HEADS)])
    keys = keys.reshape(HEADS, len(positions), WIDTH)
    return keys, -keys


class CacheMachine(RuleBasedStateMachine):
    """``model`` holds, per head, the positions that should still be stored."""

    @initialize()
    def start(self) -> None:
        self.cache = LayerCache()
        self.model: list[list[int]] = [[] for _ in range(HEADS)]
        self.selected: list[list[int]] | None = None
        self.boundary = 0
        self.evicted_at = 0
        self.others: list[tuple[LayerCache, list[list[int]]]] = []

    @rule(count=st.integers(1, 40))
    def append(self, count: int) -> None:
        positions = range(self.cache.seen, self.cache.seen + count)
        self.cache.append(*pairs(positions))
        for head in self.model:
            head.extend(positions)

    def _choose(self, data: st.DataObject, retention: Retention) -> KVSelection:
        boundary = data.draw(st.integers(self.evicted_at, self.cache.seen))
        heads = []
        for held in self.model:
            candidates = [p for p in held if p < boundary]
            heads.append(sorted(data.draw(st.sets(st.sampled_from(candidates), max_size=12)) if candidates else set()))
        self.selected_now, self.boundary_now = heads, boundary
        return KVSelection.from_heads([torch.tensor(h, dtype=torch.long) for h in heads], boundary, retention)

    @precondition(lambda self: self.cache.stored > 0)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        self.cache.select(self._choose(data, Retention.KEEP))
        self.selected, self.boundary = self.selected_now, self.boundary_now

    @precondition(lambda self: self.cache.stored > 0)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        selection = self._choose(data, Retention.EVICT)
        before = self.cache.store.nbytes
        self.cache.select(selection)
        tail = range(self.boundary_now, self.cache.seen)
        self.model = [[*head, *tail] for head in self.selected_now]
        self.evicted_at, self.selected = self.boundary_now, None
        held = sum(len(head) for head in self.model)  # heads that keep fewer hold no padding
        assert self.cache.store.nbytes == 2 * held * WIDTH * 4 <= before

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, self.cache.seen))
        self.cache.truncate(length)
        self.model = [[p for p in head if p < length] for head in self.model]
        self.evicted_at = min(self.evicted_at, length)
        self.selected = None

    @rule()
    def release(self) -> None:
        self.cache.release()
        self.selected = None

    @rule()
    def fork(self) -> None:
        if len(self.others) < 3:
            self.others.append((self.cache.fork(), copy.deepcopy(self.model)))

    @invariant()
    def store_holds_the_model(self) -> None:
        check_store(self.cache, self.model)

    @invariant()
    def forks_are_untouched(self) -> None:
        for cache, model in self.others:
            check_store(cache, model)

    @invariant()
    def active_set_is_selection_then_tail(self) -> None:
        assert (self.cache.active is None) == (self.selected is None)
        if self.cache.active is None:
            return
        wanted = [[*head, *range(self.boundary, self.cache.seen)] for head in self.selected]
        assert self.cache.active.attended(self.cache.seen) == sum(map(len, wanted))
        if self.cache.active.pairs is None:  # in place
            assert self.cache.active.selection.fleeting
            return
        for head, positions in enumerate(wanted):
            first = 0 if self.cache.active.first_valid is None else int(self.cache.active.first_valid[head])
            keys = self.cache.active.pairs.keys[head, first:, 0]
            assert keys.tolist() == [head * 1000.0 + p for p in positions]


def check_store(cache: LayerCache, model: list[list[int]]) -> None:
    if cache.store is None:
        assert all(not head for head in model)
        return
    stored = cache.positions()
    for head, positions in enumerate(model):
        first = 0 if cache.first_valid is None else int(cache.first_valid[head])
        row = stored if stored.dim() == 1 else stored[head]
        assert row[first:].tolist() == positions
        assert sorted(set(positions)) == positions
        assert cache.store.keys[head, first:, 0].tolist() == [head * 1000.0 + p for p in positions]
        assert torch.equal(cache.store.values[head], -cache.store.keys[head]) or first > 0
    held = cache.store.keys.numel() - (int(cache.first_valid.sum()) * WIDTH if cache.first_valid is not None else 0)
    assert cache.store.nbytes == 2 * held * 4


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
TestCacheMachine = CacheMachine.TestCase


def filled(tokens: int) -> LayerCache:
    cache = LayerCache()
    cache.append(*pairs(range(tokens)))
    return cache


def test_appending_does_not_copy_the_store_each_time() -> None:
    cache = filled(10)
    cache.append(*pairs(range(10, 11)))
    first = cache.store.keys.data_ptr()
    cache.append(*pairs(range(11, 12)))
    assert cache.store.keys.data_ptr() == first


def test_heads_that_keep_fewer_take_less_room() -> None:
    cache = filled(4000)
    heads = [torch.arange(1000), *(torch.arange(10) for _ in range(HEADS - 1))]
    cache.select(KVSelection.from_heads(heads, 4000, Retention.EVICT))
    held = 1000 + 10 * (HEADS - 1)
    assert cache.store.nbytes == 2 * held * WIDTH * 4
    assert cache.store.allocated_nbytes < 2 * (held + HEADS * 100) * WIDTH * 4
    cache.append(*pairs(range(4000, 4003)))
    assert cache.store.keys[0, :, 0].tolist() == [*range(1000), 4000, 4001, 4002]
    assert cache.store.keys[-1, 990:, 0].tolist() == [1000.0 * (HEADS - 1) + p for p in (*range(10), 4000, 4001, 4002)]


def test_evicted_bytes_are_really_freed() -> None:
    cache = filled(4000)
    held = cache.store.allocated_nbytes
    cache.select(KVSelection.uniform(torch.arange(10).expand(HEADS, -1), 4000, Retention.EVICT))
    assert cache.store.allocated_nbytes < held / 20
    assert cache.seen == 4000 and cache.stored == 10


def test_an_evicted_pair_cannot_be_selected_again() -> None:
    cache = filled(50)
    cache.select(KVSelection.uniform(torch.arange(10).expand(HEADS, -1), 50, Retention.EVICT))
    with pytest.raises(CacheError, match="evicted earlier"):
        cache.select(KVSelection.uniform(torch.tensor([[3, 20]] * HEADS), 50))


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ([[3, 1]] * 2, "sorted"),
        ([[1, 1]] * 2, "unique"),
        ([[0, 50]] * 2, r"in \[0, 50\)"),
        ([[-1, 4]] * 2, r"in \[0, 50\)"),
    ],
)
def test_a_wrong_selection_is_named(indices: list[list[int]], says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        filled(50).select(KVSelection.uniform(torch.tensor(indices), 50))


def test_layers_of_a_broken_off_pass_are_realigned() -> None:
    cache = KVCache(2)
    cache.layers[0].append(*pairs(range(8)))
    cache.layers[1].append(*pairs(range(5)))
    cache.truncate(5)
    assert [layer.seen for layer in cache.layers] == [5, 5]


def test_room_made_with_the_prefill_spares_the_decode_steps_a_copy() -> None:
    layer = LayerCache()
    for _ in range(3):  # turns: what is reserved is reserved once
        layer.reserve(600)
        layer.append(torch.zeros(1, 100, 4), torch.zeros(1, 100, 4))
        assert layer.store is not None
        before = layer.store.keys.data_ptr()
        for _ in range(600):
            layer.append(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
        assert layer.store.keys.data_ptr() == before
    assert layer.stored == 2100 and layer.store.allocated_nbytes < 2 * layer.store.nbytes
