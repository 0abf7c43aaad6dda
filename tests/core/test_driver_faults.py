"""What goes wrong in one session, a listener or a caller stays there; the other sessions and the books are as without it."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from typing import Any, ClassVar

import pytest
import torch

from loopserve.api import load_stack
from loopserve.bench.budget import with_budget
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.scheduler import Scheduler
from loopserve.core.engine.session import Session
from loopserve.core.errors import CancelledTurn, CapacityError, InputError, PolicyFault
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Step
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.policies.prefill.dense import DensePrefill
from tests.core.test_scheduler import GREEDY, alone, engine, model, prompt


def answered(served: TokenEngine, session: Session, tokens: list[int]) -> list[int]:
    return list(served.generate(session, tokens, GREEDY))


def three(served: TokenEngine) -> list[Session]:
    return [served.session() for _ in range(3)]


def test_a_listener_that_raises_harms_no_turn() -> None:
    served = engine()
    scheduler, sessions = Scheduler(served), three(served)

    def bad(request: Any) -> None:
        raise RuntimeError("mine")

    requests = [
        scheduler.submit(each, prompt(n, 10), GREEDY, listener=bad if n == 0 else None)
        for n, each in enumerate(sessions)
    ]
    scheduler.run_until_idle()
    assert [len(each.result()) for each in requests] == [7, 7, 7]
    assert [each.tokens for each in sessions] == [alone(served, [prompt(n, 10)]) for n in range(3)]


def test_a_finished_turn_is_not_run_again() -> None:
    served = engine()
    session = served.session()
    turn = served.begin(session, prompt(0, 10), GREEDY)
    while not turn.finished:
        served.run_pass([turn])
    tokens = list(session.tokens)
    served.run_pass([turn])
    assert session.tokens == tokens and isinstance(turn.error, InputError)


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_session_closed_under_way_ends_its_own_turn(passes: int) -> None:
    served = engine()
    scheduler, sessions = Scheduler(served), three(served)
    requests = [scheduler.submit(each, prompt(n, 10), GREEDY) for n, each in enumerate(sessions)]
    for _ in range(passes):
        scheduler.step()
    sessions[0].close()
    scheduler.run_until_idle()
    with pytest.raises(InputError, match="closed"):
        requests[0].result()
    assert [each.tokens for each in sessions[1:]] == [alone(served, [prompt(n, 10)]) for n in (1, 2)]


def test_a_store_is_not_released_under_way() -> None:
    served = engine("snapkv")
    session = served.session()
    stream = served.generate(session, prompt(0, 60), GREEDY)
    next(stream)
    with pytest.raises(InputError, match="still being written"):
        session.release_store()
    assert len(list(stream)) == 6


class KeepsAndWrites(DecodeCompressor[dict[str, Any]]):
    """Keep a view of the store and write into it in the next turn."""

    name: ClassVar[str] = "keeps_and_writes"
    paper: ClassVar[str] = ""

    def init_state(self) -> dict[str, Any]:
        return {}

    def after_attention(self, inputs: AttentionInputs, state: dict[str, Any]) -> None:
        KEPT.append(inputs.keys)

    def after_forward(self, step: Step, state: dict[str, Any]) -> None:
        if step.turn == 1 and KEPT:
            KEPT.pop().add_(0.5)
        return


KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize("on_fault", ["raise", "dense"])
def test_a_damaged_store_in_a_shared_pass_is_its_own_sessions_matter(on_fault: str) -> None:
    KEPT.clear()
    served = TokenEngine(TransformersModel(model()), load_stack("dense"), on_policy_fault=on_fault)
    broken = served.session(PolicyStack("writes", DensePrefill(), KeepsAndWrites()))
    sound = [served.session() for _ in range(2)]
    scheduler = Scheduler(served)
    outcomes: list[BaseException | None] = []
    for turn in range(3):
        requests = [scheduler.submit(each, prompt(turn, 10), GREEDY) for each in (broken, *sound)]
        scheduler.run_until_idle()
        assert all(each.error is None for each in requests[1:])
        outcomes.append(requests[0].error)
    turns = [prompt(turn, 10) for turn in range(3)]
    assert [each.tokens for each in sound] == [alone(engine(), turns)] * 2
    assert all("computed_anew" not in each.stats.counters for each in sound)
    assert isinstance(outcomes[1], PolicyFault) if on_fault == "raise" else outcomes[1] is None


def damage(session: Session) -> None:
    store = session.cache.layers[1].store
    assert store is not None
    store.keys.add_(0.5)


def test_a_session_recovers_from_damage_with_its_next_turn() -> None:
    served = engine()
    session = served.session()
    first = answered(served, session, prompt(0, 30))
    damage(session)
    with pytest.raises(PolicyFault, match="kept a reference"):
        answered(served, session, prompt(1, 5))
    assert answered(served, session, prompt(2, 5)) == alone(served, [prompt(0, 30), prompt(2, 5)])[-7:]
    assert len(first) == 7


@pytest.mark.parametrize("stack", ["dense", "snapkv-evict"])
def test_a_fork_does_not_make_damaged_pairs_look_whole(stack: str) -> None:
    served = engine(stack)
    session = served.session()
    answered(served, session, prompt(0, 60))
    damage(session)
    fork = session.fork()
    assert fork.cache.seen == 0 and fork.tokens == session.tokens
    whole = served.session()
    whole.tokens = list(session.tokens)
    assert len(answered(served, fork, prompt(1, 5))) == 7
    if stack == "dense":
        assert fork.tokens == alone(served, [prompt(0, 60), prompt(1, 5)])


@pytest.mark.parametrize("wrong", [[10**6], [-1], ["a"], [1.5]])
def test_what_is_no_token_is_refused_before_any_pass(wrong: list[Any]) -> None:
    served = engine()
    scheduler = Scheduler(served)
    with pytest.raises(InputError, match="is no token"):
        scheduler.submit(served.session(), wrong, GREEDY)


def test_a_chosen_token_beyond_the_vocabulary_ends_its_own_turn() -> None:
    served = engine()
    scheduler, sessions = Scheduler(served), three(served)
    requests = [scheduler.submit(sessions[0], prompt(0, 9), lambda _: 10**6, max_new_tokens=3)]
    requests += [scheduler.submit(each, prompt(1, 9), GREEDY) for each in sessions[1:]]
    scheduler.run_until_idle()
    with pytest.raises(InputError, match="was chosen"):
        requests[0].result()
    assert sessions[0].tokens == [] and all(len(each.result()) == 7 for each in requests[1:])


def test_a_generator_left_after_its_last_token_keeps_its_turn_and_later_ones() -> None:
    served = engine()
    session = served.session()
    stream = served.generate(session, prompt(0, 20), GREEDY)
    assert len(list(itertools.islice(stream, 7))) == 7
    answered(served, session, prompt(1, 5))
    stream.close()
    assert len(session.turns) == 2 and session.tokens == alone(served, [prompt(0, 20), prompt(1, 5)])


def test_ctrl_c_while_a_turn_begins_leaves_nothing_behind() -> None:
    class Interrupted(DecodeCompressor[None]):
        name: ClassVar[str] = "interrupted"
        paper: ClassVar[str] = ""

        def init_state(self) -> None:
            raise KeyboardInterrupt

    served = TokenEngine(TransformersModel(model()), load_stack("dense"))
    scheduler = Scheduler(served, kv_memory=1 << 30)
    request = scheduler.submit(
        served.session(PolicyStack("interrupted", DensePrefill(), Interrupted())), prompt(0, 9), GREEDY
    )
    beside = scheduler.submit(served.session(), prompt(1, 9), GREEDY)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    with pytest.raises(CancelledTurn):
        request.result(timeout=0)
    scheduler.run_until_idle()
    assert len(beside.result()) == 7 and scheduler.running == 0


def test_ctrl_c_in_a_pass_ends_the_turns_under_way_and_keeps_the_complete_ones() -> None:
    served = engine()
    scheduler, sessions = Scheduler(served), three(served)

    def interrupted(logits: torch.Tensor) -> int:
        raise KeyboardInterrupt

    complete = scheduler.submit(sessions[0], prompt(0, 9), lambda _: 5, max_new_tokens=1)
    scheduler.submit(sessions[1], prompt(1, 9), interrupted, max_new_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    assert complete.result(timeout=0) == [5] and len(sessions[0].tokens) == 10
    assert sessions[1].tokens == [] and not sessions[1].busy
    assert len(scheduler.submit(sessions[2], prompt(2, 9), GREEDY).new_tokens) == 9


def test_the_queue_is_bounded_before_anything_runs() -> None:
    served = engine()
    scheduler = Scheduler(served, max_sessions=2, max_queued=3)
    for number in range(5):
        scheduler.submit(served.session(), prompt(number, 5), GREEDY)
    with pytest.raises(CapacityError):
        scheduler.submit(served.session(), prompt(9, 5), GREEDY)
    scheduler.run_until_idle()


def test_the_ledger_counts_forks_direct_turns_and_what_was_given_back() -> None:
    served = TokenEngine(TransformersModel(model()), load_stack("dense"))
    scheduler = Scheduler(served, kv_memory=1 << 30)
    session = served.session()
    scheduler.submit(session, prompt(0, 50), GREEDY)
    scheduler.run_until_idle()
    assert scheduler.ledger.used == session.allocated_bytes > 0
    fork = session.fork()
    direct = served.session()
    answered(served, direct, prompt(1, 50))
    assert scheduler.ledger.used == sum(each.allocated_bytes for each in (session, fork, direct))
    session.close()
    fork.undo()
    direct.release_store()
    assert scheduler.ledger.used == fork.allocated_bytes
    del fork
    gc.collect()
    assert scheduler.ledger.used == 0


def test_idle_stores_stay_where_releasing_them_would_not_help() -> None:
    served = TokenEngine(TransformersModel(model()), load_stack("dense"))
    needed = Scheduler(served, kv_memory=1 << 30).ledger.needed(served.session(), 400, 7)
    scheduler = Scheduler(served, kv_memory=int(needed * 1.4))
    idle = served.session()
    answered(served, idle, prompt(0, 20))
    held = idle.allocated_bytes
    first = scheduler.submit(served.session(), prompt(1, 400), GREEDY)
    second = scheduler.submit(served.session(), prompt(2, 400), GREEDY)
    scheduler.step()
    assert scheduler.waiting == 1 and idle.allocated_bytes == held
    scheduler.run_until_idle()
    assert len(first.result()) == len(second.result()) == 7


def test_a_chooser_may_use_the_engine() -> None:
    served = engine()
    other = served.session()

    def asks(logits: torch.Tensor) -> int:
        answered(served, other, prompt(1, 5))
        return int(logits.argmax())

    done: list[int] = []
    thread = threading.Thread(
        target=lambda: done.extend(served.generate(served.session(), prompt(0, 9), asks, max_new_tokens=2)), daemon=True
    )
    thread.start()
    thread.join(timeout=60)
    assert len(done) == 2 and len(other.turns) == 2


def test_threads_that_open_sessions_under_a_new_stack_get_sessions_of_the_engine() -> None:
    served = TokenEngine(TransformersModel(model()), load_stack("dense"))
    stack = with_budget(load_stack("snapkv"), 48)
    sessions: list[Session] = []
    threads = [threading.Thread(target=lambda: sessions.append(served.session(stack))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(answered(served, each, prompt(0, 5))) == 7 for each in sessions)


def test_an_answer_without_a_prefill_is_refused() -> None:
    served = engine()
    with pytest.raises(InputError, match="no turn waits"):
        next(served.decode(served.session(), torch.zeros(8, dtype=torch.float32), GREEDY))


def test_the_error_of_a_request_does_not_keep_its_session_alive() -> None:
    served = engine()
    scheduler = Scheduler(served)
    session = served.session()
    request = scheduler.submit(session, prompt(0, 9), lambda _: 10**6, max_new_tokens=3)
    scheduler.run_until_idle()
    error, seen = request.error, weakref.ref(session)
    del session, request
    gc.collect()
    assert isinstance(error, InputError) and seen() is None
