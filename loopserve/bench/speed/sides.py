"""Whole models side by side: our engine under a stack, and transformers by itself, over one shared history.

The history of N tokens is put into the cache directly (random keys and values: prefilling it densely would take minutes).
All sides use the same buffers, one after another; each puts the length back to where it found it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

from loopserve.bench.rows import Row
from loopserve.bench.speed.audit import audited
from loopserve.bench.speed.candidates import DTYPES
from loopserve.bench.speed.paired import watched
from loopserve.bench.speed.suite import Dtype, ModelShape
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.kv.buffers import PairBuffer
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.plain import forward, growing_cache, preallocated_cache
from loopserve.models.random import random_llama

_ROOM = 1024  # positions beside the history, for turns and answers
_SPREAD = 0.5  # standard deviation of stored keys, about what random weights give
_NO_STOP: frozenset[int] = frozenset()


class SharedModel:
    """One random model and the history that its sides share."""

    def __init__(
        self, shape: ModelShape, dtype: Dtype, tokens: int, new_tokens: int, device: str, positions: int | None = None
    ) -> None:
        """tokens: history. new_tokens: length of the turns that sides answer. positions: longest conversation."""
        assert isinstance(shape.kv_heads, int)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.model = random_llama(
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            intermediate=shape.intermediate,
            vocabulary=shape.vocabulary,
            positions=(positions or tokens + new_tokens) + _ROOM,
            dtype=DTYPES[dtype],
            device=device,
        )
        draw = torch.Generator().manual_seed(0)
        self.new_ids = torch.randint(0, shape.vocabulary, (new_tokens,), generator=draw, device="cpu")
        self.tokens = tokens
        self.pairs = self._random_pairs() if tokens else []

    def _random_pairs(self) -> list[PairBuffer]:
        """A buffer per layer. Layers hold the same numbers, shifted: drawing a billion takes longer than using them."""
        assert isinstance(self.shape.kv_heads, int)
        draw = torch.Generator(device=self.device).manual_seed(0)
        size = (2, self.shape.kv_heads, self.tokens, self.shape.hidden // self.shape.heads)
        drawn = (
            torch.randn(size, generator=draw, dtype=torch.float32, device=self.device)
            .mul_(_SPREAD)
            .to(DTYPES[self.dtype])
        )
        room = len(self.new_ids) + _ROOM
        layers = range(self.shape.layers)
        return [PairBuffer(drawn[0].roll(each, dims=1), drawn[1].roll(each, dims=1), slack=room) for each in layers]

    def stand_at(self, length: int) -> None:
        """Forget what sides have appended beyond a length. What another side left below it is as good as any."""
        for each in self.pairs:
            each.length = length

    def described(self) -> Row:
        shape = self.shape
        return {
            "layers": shape.layers,
            "hidden": shape.hidden,
            "q_heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.hidden // shape.heads,
            "vocabulary": shape.vocabulary,
        }


class EngineSide:
    """Our engine under one stack. A first short turn stays in its session, so that what a policy keeps over turns (key
    codes of the history, say) is there, as it would be in a conversation.
    """

    def __init__(self, shared: SharedModel, stack: PolicyStack) -> None:
        self.shared = shared
        self.engine = TokenEngine(TransformersModel(shared.model), stack)
        self.session = self.engine.session()
        self.session.tokens = [0] * shared.tokens
        for layer, pairs in zip(self.session.cache.layers, shared.pairs, strict=False):
            layer.store, layer.seen = pairs, shared.tokens
        with watched() as self.seen, audited() as self.audit:
            if shared.tokens:
                for _ in self._generate(2):
                    pass
            else:
                self.whole(2)

    def _generate(self, outputs: int) -> Iterator[int]:
        set_implementation(self.shared.model, IMPLEMENTATION)
        self.shared.stand_at(self.session.cache.seen)
        sampling = SamplingConfig(max_new_tokens=outputs)
        return self.engine.generate(self.session, self.shared.new_ids.tolist(), sampling, _NO_STOP)

    def answer(self, outputs: int) -> tuple[float, list[float]]:
        seconds = list(_between(self._generate(outputs)))
        self.session.undo()
        return seconds[0], seconds[1:]

    def described(self) -> Row:
        """What a row says of implementations and parity, from the first turn."""
        parts = {op: "+".join(sorted(names)) for op, names in sorted(self.seen.served.items())}
        said: Row = {"impl": self.seen.impl(), "impl_parts": parts, "parity_errs": self.audit.errors}
        if unaudited := sorted(parts.keys() - self.audit.errors.keys()):
            said["unaudited"] = unaudited
        if self.audit.problems:
            return said | {"parity": "failed", "error": self.audit.problems[0]}
        return said | {"parity": "ok"}

    def phases(self, outputs: int) -> dict[str, float]:
        """Share of the decode steps' time by operation, and of the policy's own code, over one answer that is watched.

        The rest is the model's and the loop's.
        """
        answer = self._generate(outputs)
        next(answer)
        started = time.perf_counter()
        with watched(type(each) for each in self.session.slots.compressors.values()) as seen:
            for _ in answer:
                pass
        shares = seen.shares(time.perf_counter() - started)
        self.session.undo()
        return {op: round(share, 4) for op, share in shares.items()}

    def whole(self, outputs: int) -> float:
        """Seconds of a conversation of one turn from nothing: prefill and ``outputs`` tokens."""
        set_implementation(self.shared.model, IMPLEMENTATION)
        session, sampling = self.engine.session(), SamplingConfig(max_new_tokens=outputs)
        started = time.perf_counter()
        for _ in self.engine.generate(session, self.shared.new_ids.tolist(), sampling, _NO_STOP):
            pass
        return time.perf_counter() - started


class PlainSide:
    """Transformers' own model and SDPA, on a cache that is written in place or on its own, which concatenates."""

    def __init__(self, shared: SharedModel, cache: Literal["preallocated", "growing"]) -> None:
        self.shared, self.kind = shared, cache

    def answer(self, outputs: int) -> tuple[float, list[float]]:
        shared = self.shared
        set_implementation(shared.model, "sdpa")
        shared.stand_at(shared.tokens)
        preallocated = self.kind == "preallocated"
        cache = preallocated_cache(shared.pairs) if preallocated else growing_cache(shared.model, shared.pairs)

        def tokens() -> Iterator[int]:
            ids = shared.new_ids.to(shared.device)
            for _ in range(outputs):
                ids = forward(shared.model, cache, ids).argmax()[None]
                yield int(ids)

        seconds = list(_between(tokens()))
        shared.stand_at(shared.tokens)
        return seconds[0], seconds[1:]


def _between(tokens: Iterator[Any]) -> Iterator[float]:
    """Seconds that each item took to come."""
    started = time.perf_counter()
    for _ in tokens:
        now = time.perf_counter()
        yield now - started
        started = time.perf_counter()
