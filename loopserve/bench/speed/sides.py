"""Time several sides in paired runs, each once per round, A B A B, in one process.

``SharedModel`` and the sides over it are whole models over one shared history: our engine under a stack, and transformers by itself.

The history of N tokens is written into the cache directly as random keys and values, since a dense prefill would take
minutes. All sides use the same buffers, one after another; each restores the initial length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loopserve.bench.rows import Row
from loopserve.bench.speed.parity import DTYPES, audited
from loopserve.bench.speed.suite import Dtype, ModelShape
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.kv.buffers import PairBuffer
from loopserve.core.policy.interfaces import DecodeCompressor
from loopserve.core.stack.stack import PolicyStack
from loopserve.kernels.backend import Operation
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.plain import forward, growing_cache, preallocated_cache
from loopserve.models.random import random_llama

_SPARE_POSITIONS = 1024  # positions beside the history, for turns and answers
_SPREAD = 0.5  # standard deviation of stored keys, about that of random weights
_NO_STOP: frozenset[int] = frozenset()
Clock = Callable[[Callable[[], object]], float]
_LEAST_S = 2e-3  # seconds: shorter calls are repeated, since the clock's resolution would show
_MOST_REPEATS = 20
_MOMENTS = ("before_attention", "after_attention", "after_forward")  # when a compressor acts


class SharedModel:
    """Hold one random model and the history that its sides share."""

    def __init__(
        self, shape: ModelShape, dtype: Dtype, tokens: int, new_tokens: int, device: str, positions: int | None = None
    ) -> None:
        """Make the model and the history. tokens: of the history. new_tokens: per turn. positions: longest conversation."""
        assert isinstance(shape.kv_heads, int)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.model = random_llama(
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            intermediate=shape.intermediate,
            vocabulary=shape.vocabulary,
            positions=(positions or tokens + new_tokens) + _SPARE_POSITIONS,
            dtype=DTYPES[dtype],
            device=device,
        )
        draw = torch.Generator().manual_seed(0)
        self.new_ids = torch.randint(0, shape.vocabulary, (new_tokens,), generator=draw, device="cpu")
        self.tokens = tokens
        self.pairs = self._random_pairs() if tokens else []

    def _random_pairs(self) -> list[PairBuffer]:
        """Return a buffer per layer. Layers hold the same numbers, shifted: drawing a billion takes longer."""
        assert isinstance(self.shape.kv_heads, int)
        draw = torch.Generator(device=self.device).manual_seed(0)
        size = (2, self.shape.kv_heads, self.tokens, self.shape.hidden // self.shape.heads)
        drawn = (
            torch.randn(size, generator=draw, dtype=torch.float32, device=self.device)
            .mul_(_SPREAD)
            .to(DTYPES[self.dtype])
        )
        slack = len(self.new_ids) + _SPARE_POSITIONS
        layers = range(self.shape.layers)
        return [PairBuffer(drawn[0].roll(each, dims=1), drawn[1].roll(each, dims=1), slack=slack) for each in layers]

    def stand_at(self, length: int) -> None:
        """Cut the buffers to a length, without the tokens that sides appended. Random content below it stays valid."""
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
    """Time our engine under one stack. A short first turn stays in its session.

    So policies hold the state that they keep across turns (key codes of the history, for example), as in a
    conversation.
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
        """Return the row fields on implementations and parity, from the first turn."""
        parts = {op: "+".join(sorted(names)) for op, names in sorted(self.seen.served.items())}
        fields: Row = {"impl": self.seen.impl(), "impl_parts": parts, "parity_errs": self.audit.errors}
        if unaudited := sorted(parts.keys() - self.audit.errors.keys()):
            fields["unaudited"] = unaudited
        if self.audit.problems:
            return fields | {"parity": "failed", "error": self.audit.problems[0]}
        return fields | {"parity": "ok"}

    def phases(self, outputs: int) -> dict[str, float]:
        """Return the share of the decode steps' time by operation, and of the policy's own code, over one recorded answer.

        The remaining time is the model's and the loop's.
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
        """Return seconds of a conversation of one turn without history: prefill and ``outputs`` tokens."""
        set_implementation(self.shared.model, IMPLEMENTATION)
        session, sampling = self.engine.session(), SamplingConfig(max_new_tokens=outputs)
        started = time.perf_counter()
        for _ in self.engine.generate(session, self.shared.new_ids.tolist(), sampling, _NO_STOP):
            pass
        return time.perf_counter() - started


class PlainSide:
    """Time transformers' own model and SDPA, on a cache written in place or on its own one, which concatenates."""

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
    """Return the seconds before each item."""
    started = time.perf_counter()
    for _ in tokens:
        now = time.perf_counter()
        yield now - started
        started = time.perf_counter()


@dataclass(frozen=True)
class Runner:
    """Hold a timed call. scale: factor from measured to reported time, for work that is a known part or multiple.

    A baseline on 2 of 8 heads has scale 4.
    """

    run: Callable[[], object]
    scale: float = 1.0


def wall_clock(run: Callable[[], object]) -> float:
    """Return seconds of one call on the CPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def paired_runs(runners: Mapping[str, Runner], runs: int, clock: Clock = wall_clock) -> dict[str, list[float]]:
    """Return scaled seconds per runner, ``runs`` each, all runners in turn within a round. Runners should be warm."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(runs):
        for name, each in runners.items():
            found[name].append(_seconds(each.run, clock) * each.scale)
    return found


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    """Return the mean over as many calls as fill the minimum measurable time; one call if that is long enough."""
    total, count = 0.0, 0
    while total < _LEAST_S and count < _MOST_REPEATS:
        total += clock(run)
        count += 1
    return total / count


@dataclass
class Watched:
    """Hold, by operation, the implementations used, and by operation and policy the seconds spent in it, nested ones excluded."""

    served: dict[str, set[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    def impl(self, *operations: str) -> str:
        """Return the implementations of these operations (all by default), joined by ``+``."""
        names = {name for op in (operations or self.served) for name in self.served.get(op, ())}
        return "+".join(sorted(names))

    def shares(self, whole: float) -> dict[str, float]:
        """Return the share of ``whole`` seconds by operation."""
        return {op: seconds / whole for op, seconds in sorted(self.seconds.items())} if whole else {}

    def clocked(self, name: str, run: Callable[[], Any]) -> Any:
        """Return the result of ``run`` and add its time to ``name``."""
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            return run()
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent


@contextmanager
def watched(policies: Iterable[type[DecodeCompressor[Any]]] = ()) -> Iterator[Watched]:
    """Record the implementations that the backend returns, and the time of operations and of the policies' own code.

    It is never active during a timed run.
    """
    seen = Watched()
    call, implementation = Operation.__call__, Operation.implementation

    def timed(self: Operation, *args: Any, **options: Any) -> Any:
        return seen.clocked(self.name, lambda: call(self, *args, **options))

    def noted(self: Operation, name: str) -> Callable[..., Any]:
        seen.served.setdefault(self.name, set()).add(name)
        return implementation(self, name)

    with ExitStack() as undo:
        undo.enter_context(_replaced(Operation, "__call__", timed))
        undo.enter_context(_replaced(Operation, "implementation", noted))
        for policy in set(policies):
            for method in _MOMENTS:
                undo.enter_context(_replaced(policy, method, _clocked_method(seen, getattr(policy, method))))
        yield seen


def _clocked_method(seen: Watched, method: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        return seen.clocked("policy", lambda: method(*args, **options))

    return timed


@contextmanager
def _replaced(owner: type, name: str, value: object) -> Iterator[None]:
    """Replace a class's attribute in a block, and restore inheritance after it for an inherited one."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
