"""Undo of any depth, forks and deep copies, and memory that is free when ``close`` returns, garbage collector off."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from loopserve import Engine
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.errors import CacheError, ConfigError, InputError
from tests.policies.conversations import DENSE, FULL, engine, prompts

TURNS = 13
ANSWER = 4
SPARSE = {
    "policy": "loopserve",
    "alpha": 0.7,
    "sample_rows": 8,
    "sampling": "last",
    "local_window": 2,
    "sink_tokens": 1,
}
SPARSE |= {"min_new_tokens": 1, "min_total_tokens": 1, "dense_above": 1.0}
SNAP = {"policy": "snapkv", "budget": 24, "window": 4}
CODES = {
    "policy": "loopserve",
    "budget": 24,
    "interval": 2,
    "recent_window": 4,
    "page_budget": 6,
    "key_bits": 8,
    "page": 8,
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, FULL),
    "sparse prefill": (SPARSE, FULL),
    "keep": (DENSE, SNAP),
    "keep with summaries": (SPARSE, CODES | {"rescore": "codes"}),
    "keep by a threshold": (DENSE, CODES | {"rescore": "codes", "page_budget_rule": "threshold", "scope": "all"}),
    "evict": (DENSE, SNAP | {"retention": "evict"}),
    "evict within the answer": (DENSE, {"policy": "tova", "budget": 24, "retention": "evict"}),
    "state carried": (DENSE, {"policy": "h2o", "budget": 24}),
    "state carried, evict": (DENSE, {"policy": "h2o", "budget": 24, "retention": "evict"}),
}
PROMPTS = prompts(7, (11, 9, 14, 1, 12, 10, 9, 13, 2, 11, 10, 12, 9))
NEXT = prompts(8, (15,))[0]
TIMES = {"ttft_ms", "tpot_ms"}


def served(kind: str, undo_depth: int = 8) -> TokenEngine:
    return engine("llama", *KINDS[kind], undo_depth=undo_depth)


def say(session: Session, by: TokenEngine, tokens: list[int]) -> torch.Tensor:
    """The logits of a turn's outputs, greedily chosen."""
    found: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> int:
        found.append(logits)
        return int(logits.argmax())

    list(by.generate(session, tokens, choose, max_new_tokens=ANSWER))
    return torch.stack(found)


def figures(session: Session) -> list[dict[str, Any]]:
    return [{name: value for name, value in turn.as_dict().items() if name not in TIMES} for turn in session.turns]


@cache
def reference(kind: str) -> list[tuple[list[int], list[dict[str, Any]], torch.Tensor]]:
    """After 0, 1, ... turns of a conversation in which nothing was undone: tokens, figures, and the next answer."""
    by = served(kind)
    session, found = by.session(), []
    for tokens in [*PROMPTS, None]:
        other = by.session()
        for each in PROMPTS[: len(found)]:
            say(other, by, each)
        assert other.tokens == session.tokens
        found.append((list(other.tokens), figures(other), say(other, by, NEXT)))
        if tokens is not None:
            say(session, by, tokens)
    return found


@pytest.mark.parametrize("undo_depth", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_undo_of_any_depth(kind: str, undo_depth: int) -> None:
    by = served(kind, undo_depth)
    session = by.session()
    for tokens in PROMPTS:
        say(session, by, tokens)
    assert sum(start.states is not None for start in session._starts) == undo_depth
    exact = 1 if session.slots.evicts else undo_depth  # one copy of the survivors is kept at rest
    for depth in range(1, TURNS):
        session.undo()
        tokens, turns, answer = reference(kind)[TURNS - depth]
        assert session.tokens == tokens and figures(session) == turns
        assert session.cache.seen == (len(tokens) - 1 if depth <= exact else 0)
        tried = session.fork()
        if depth <= exact:
            assert torch.equal(say(tried, by, NEXT), answer)
            assert tried.stats.reused_tokens == len(tokens)
        else:
            fresh = by.session()
            assert torch.equal(say(tried, by, NEXT), say(fresh, by, [*tokens, *NEXT]))
            assert tried.stats.reused_tokens == 0 and tried.stats.prompt_tokens == len(NEXT)
        tried.undo()  # and the turn after an undo can be taken back as well
        assert tried.tokens == tokens and figures(tried) == turns
        assert tried.cache.seen == session.cache.seen
    session.undo()
    assert session.tokens == [] and session.turns == [] and session.cache.seen == 0
    with pytest.raises(CacheError, match="nothing to undo"):
        session.undo()
    assert torch.equal(say(session, by, NEXT), reference(kind)[0][2])


@pytest.mark.parametrize("kind", KINDS)
def test_turns_after_a_deep_undo_can_be_undone_exactly(kind: str) -> None:
    by = served(kind, 2)
    session = by.session()
    for tokens in PROMPTS[:6]:
        say(session, by, tokens)
    for _ in range(4):
        session.undo()
    other = by.session()
    first = say(session, by, PROMPTS[6]), say(other, by, [*session.tokens[: session._starts[-1].tokens], *PROMPTS[6]])
    assert torch.equal(*first)
    for tokens in PROMPTS[7:9]:
        assert torch.equal(say(session, by, tokens), say(other, by, tokens))
    session.undo()
    other.undo()
    assert torch.equal(say(session, by, NEXT), say(other, by, NEXT))


def test_the_undo_depth_is_at_least_one() -> None:
    with pytest.raises(ConfigError, match="undo_depth must be at least 1, got 0"):
        served("keep", 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [Session.fork, copy.deepcopy], ids=["fork", "deepcopy"])
def test_a_copy_goes_its_own_way(kind: str, copied: Callable[[Session], Session]) -> None:
    by = served(kind)
    session = by.session()
    for tokens in PROMPTS[:3]:
        say(session, by, tokens)
    other = copied(session)
    say(other, by, PROMPTS[5])
    assert torch.equal(say(session, by, NEXT), reference(kind)[3][2])
    other.undo()
    assert figures(other) == reference(kind)[3][1]
    assert torch.equal(say(other, by, NEXT), reference(kind)[3][2])
    for each in (session, other):
        each.undo()
        each.undo()
    twice = copied(other)
    other.close()
    assert torch.equal(say(session, by, NEXT), say(twice, by, NEXT))


# Memory.


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def memory_of(session: Session) -> list[StorageWeakRef]:
    """Every storage of the cache, of the copies to go back to, and of the states."""
    caches = [session.cache, *(start.cache for start in session._starts if start.cache is not None)]
    layers = [layer for each in caches for layer in each.layers if layer.store is not None]
    tensors = [part for layer in layers for part in (layer.store.keys, layer.store.values)]  # type: ignore[union-attr]
    tensors += [
        layer.active.pairs.keys for layer in layers if layer.active is not None and layer.active.pairs is not None
    ]
    states = [session.states, *(start.states for start in session._starts)]
    tensors += [each for state in states for each in _tensors(state, set())]
    return [StorageWeakRef(each.untyped_storage()) for each in tensors]


def _tensors(value: Any, met: set[int]) -> list[torch.Tensor]:
    if id(value) in met or isinstance(value, type):
        return []
    met.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    parts = list(parts) or list(getattr(value, "__dict__", {}).values())
    return [found for part in parts for found in _tensors(part, met)]


def assert_freed(session: Session, references: list[StorageWeakRef], close: Callable[[], None]) -> None:
    assert references and not any(each.expired() for each in references)
    tokens = list(session.tokens)
    close()
    assert all(each.expired() for each in references)
    assert session.closed and session.tokens == tokens  # tokens and figures stay readable
    with pytest.raises(InputError, match="closed"):
        session.undo()


def whole_turns(by: TokenEngine, session: Session) -> None:
    for tokens in PROMPTS[:3]:
        say(session, by, tokens)


def a_stream_left_early(by: TokenEngine, session: Session) -> None:
    whole_turns(by, session)
    stream = by.generate(session, PROMPTS[3], lambda logits: int(logits.argmax()), max_new_tokens=ANSWER)
    next(stream)
    stream.close()


def a_stream_dropped(by: TokenEngine, session: Session) -> None:
    whole_turns(by, session)
    next(by.generate(session, PROMPTS[3], lambda logits: int(logits.argmax()), max_new_tokens=ANSWER))


def a_turn_that_failed(by: TokenEngine, session: Session) -> None:
    whole_turns(by, session)

    def broken(logits: torch.Tensor) -> int:
        raise OverflowError("no token")

    try:
        list(by.generate(session, PROMPTS[3], broken, max_new_tokens=ANSWER))
    except OverflowError:
        return
    raise AssertionError


def a_pass_that_failed(by: TokenEngine, session: Session) -> None:
    whole_turns(by, session)
    layer = by.model.model.model.layers[1]  # type: ignore[attr-defined]
    handle = layer.register_forward_pre_hook(_fail)
    try:
        list(by.generate(session, PROMPTS[3], lambda logits: int(logits.argmax()), max_new_tokens=ANSWER))
    except OverflowError:
        return
    finally:
        handle.remove()
    raise AssertionError


def _fail(*_: Any) -> None:
    raise OverflowError("out of memory")


def an_answer_still_to_come(by: TokenEngine, session: Session) -> None:
    whole_turns(by, session)
    by.prefill(session, PROMPTS[3], max_new_tokens=ANSWER)


def an_undone_turn(by: TokenEngine, session: Session) -> None:
    whole_turns(by, session)
    session.undo()


ENDS = [
    whole_turns,
    a_stream_left_early,
    a_stream_dropped,
    a_turn_that_failed,
    a_pass_that_failed,
    an_answer_still_to_come,
    an_undone_turn,
]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_close_frees_everything_at_once(kind: str, end: Callable[[TokenEngine, Session], None]) -> None:
    by = served(kind)
    session = by.session()
    with no_collector():
        end(by, session)
        assert_freed(session, memory_of(session), session.close)


def test_close_frees_only_its_own_session() -> None:
    by = served("state carried")
    session = by.session()
    with no_collector():
        whole_turns(by, session)
        other = session.fork()
        kept = memory_of(other)
        assert_freed(session, memory_of(session), session.close)
        assert not any(each.expired() for each in kept)
        say(other, by, NEXT)


def test_an_undo_frees_what_only_the_turn_held() -> None:
    by = served("keep")
    session = by.session()
    with no_collector():
        whole_turns(by, session)
        say(session, by, NEXT)
        layers = session.cache.layers
        active = [StorageWeakRef(each.active.pairs.keys.untyped_storage()) for each in layers]  # type: ignore[union-attr]
        session.undo()
        assert all(each.expired() for each in active)


@cache
def demo() -> Engine:
    return Engine.from_pretrained("demo", "loopserve")


@pytest.mark.parametrize("way", ["send", "stream", "left early", "failed", "retried", "with"])
def test_a_chat_session_frees_its_memory_when_it_is_closed(way: str) -> None:
    text = "we had soup for lunch today . " * 20
    with no_collector():
        chat = demo().session()
        chat.send(text, max_new_tokens=2)
        if way == "stream":
            list(chat.stream(text, max_new_tokens=3))
        elif way == "left early":
            next(chat.stream(text, max_new_tokens=5))
        elif way == "failed":
            with pytest.raises(InputError):
                chat.send("soup " * 100_000, max_new_tokens=2)
        elif way == "retried":
            chat.retry(max_new_tokens=3)
        session = chat._session
        assert session is not None
        references = memory_of(session)
        assert_freed(session, references, (lambda: chat.__exit__(None, None, None)) if way == "with" else chat.close)


def test_a_session_closed_in_the_midst_of_its_answer_ends_the_stream_with_an_error() -> None:
    by = served("state carried")
    session = by.session()
    whole_turns(by, session)
    stream = by.generate(session, NEXT, lambda logits: int(logits.argmax()), max_new_tokens=ANSWER)
    next(stream)
    session.close()
    with pytest.raises(InputError, match="the session was closed before its answer was complete"):
        next(stream)
    assert session.cache.seen == 0
    left = by.session()
    stream = by.generate(left, NEXT, lambda logits: int(logits.argmax()), max_new_tokens=ANSWER)
    next(stream)
    left.close()
    stream.close()  # no error
