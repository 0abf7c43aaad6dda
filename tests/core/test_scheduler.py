"""Many sessions at once: each gets what it gets alone, whatever happens to the others."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from loopserve.api import load_stack
from loopserve.bench.budget import with_budget
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.scheduler import Scheduler
from loopserve.core.engine.session import Session
from loopserve.core.errors import CancelledTurn, CapacityError, ConfigError, InputError, ModelError, PolicyFault
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import VOCABULARY, tiny_model
from loopserve.policies.decode.full import FullDecode
from tests.recorded.conversations import presets

GREEDY = SamplingConfig(max_new_tokens=7)
WHOLE = 4096  # prefill tokens of a pass: no prompt here is cut into pieces


@cache
def model() -> PreTrainedModel:
    found = tiny_model("llama")
    set_implementation(found, IMPLEMENTATION)
    return found


@cache
def engine(stack: str = "dense") -> TokenEngine:
    return TokenEngine(TransformersModel(model()), with_budget(load_stack(stack), 48))


def prompt(seed: int, tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()


def alone(served: TokenEngine, turns: list[list[int]]) -> list[int]:
    session = served.session()
    for tokens in turns:
        list(served.generate(session, tokens, GREEDY))
    return session.tokens


@pytest.mark.parametrize("preset", presets())
def test_every_preset_answers_as_alone(preset: str) -> None:
    served = engine(preset)
    scheduler = Scheduler(served, max_num_batched_tokens=WHOLE)
    turns = [
        [prompt(10 * n + turn, tokens) for turn, tokens in enumerate(lengths)]
        for n, lengths in enumerate([(70, 9), (33, 60), (50, 1)])
    ]
    sessions = [served.session() for _ in turns]
    for turn in range(2):
        requests = [scheduler.submit(each, turns[n][turn], GREEDY) for n, each in enumerate(sessions)]
        scheduler.run_until_idle()
        assert all(len(request.result()) == 7 for request in requests)
    assert [each.tokens for each in sessions] == [alone(served, each) for each in turns]


def test_sessions_under_different_stacks_share_passes() -> None:
    served = engine()
    names = ["dense", "loopserve", "snapkv-evict", "quest", "h2o"]
    sessions = [served.session(with_budget(load_stack(name), 48)) for name in names]
    scheduler = Scheduler(served, max_num_batched_tokens=WHOLE)
    for turn, tokens in enumerate((90, 20)):
        for session in sessions:
            scheduler.submit(session, prompt(turn, tokens), GREEDY)
        scheduler.run_until_idle()
    turns = [prompt(0, 90), prompt(1, 20)]
    assert [each.tokens for each in sessions] == [alone(engine(name), turns) for name in names]
    assert len({tuple(each.tokens) for each in sessions}) > 1


def test_a_stack_that_the_model_cannot_be_served_under_is_refused() -> None:
    sliding = tiny_model("mistral_window")
    set_implementation(sliding, IMPLEMENTATION)
    with pytest.raises(ConfigError, match="no full-attention layer"):
        TokenEngine(TransformersModel(sliding), load_stack("dense")).session(load_stack("snapkv"))


ACTS = st.sampled_from(["send", "send", "send", "step", "step", "cancel", "undo", "fork", "release"])


@settings(max_examples=40, deadline=None)
@given(
    stack=st.sampled_from(["dense", "loopserve", "snapkv", "snapkv-evict", "h2o", "quest"]),
    acts=st.lists(st.tuples(ACTS, st.integers(0, 5), st.integers(1, 40)), min_size=5, max_size=40),
)
def test_interleaved_sessions_answer_as_alone(stack: str, acts: list[tuple[str, int, int]]) -> None:
    """Send, cancel, undo, fork and release in any order over two to six sessions; what is left of each is as if held alone."""
    served = engine(stack)
    scheduler = Scheduler(served, max_num_batched_tokens=WHOLE, max_sessions=3)
    sessions: list[Session] = [served.session(), served.session()]
    said: list[list[list[int]]] = [[], []]  # per session the prompts of its complete turns
    exact = [True, True]  # a released store is computed anew in one piece, which a policy may see otherwise
    requests: dict[int, Any] = {}

    def settle() -> None:
        for number, request in list(requests.items()):
            if request.done.is_set():
                if request.error is None:
                    said[number].append(request.new_tokens)
                else:
                    assert isinstance(request.error, CancelledTurn)
                del requests[number]

    for number, (act, pick, size) in enumerate(acts):
        at = pick % len(sessions)
        if act == "send" and at not in requests and len(sessions[at].tokens) < 300:
            requests[at] = scheduler.submit(sessions[at], prompt(number, size), GREEDY)
        elif act == "step":
            for _ in range(size % 5):
                scheduler.step()
        elif act == "cancel" and at in requests:
            scheduler.cancel(requests[at])
            scheduler.step()
        elif at not in requests and said[at]:
            if act == "undo":
                sessions[at].undo()
                said[at].pop()
            elif act == "fork" and len(sessions) < 6:
                sessions.append(sessions[at].fork())
                said.append(list(said[at]))
                exact.append(exact[at])
            elif act == "release":
                sessions[at].release_store()
                exact[at] = False
        settle()
    scheduler.run_until_idle()
    settle()
    assert not requests
    for session, turns, kept in zip(sessions, said, exact, strict=True):
        if kept or stack == "dense":
            assert session.tokens == alone(served, turns)
        assert session.cache.seen in (0, max(0, len(session.tokens) - 1))


def test_small_pieces_and_many_sessions_give_the_same_tokens() -> None:
    served = engine()
    scheduler = Scheduler(served, max_num_batched_tokens=16, max_sessions=4)
    turns = [[prompt(n, 20 + 13 * n)] for n in range(9)]
    sessions = [served.session() for _ in turns]
    requests = [scheduler.submit(each, turn[0], GREEDY) for each, turn in zip(sessions, turns, strict=True)]
    scheduler.run_until_idle()
    assert all(request.done.is_set() for request in requests)
    assert [each.tokens for each in sessions] == [alone(served, each) for each in turns]


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    served = engine()
    scheduler = Scheduler(served, max_num_batched_tokens=64)
    long = scheduler.submit(served.session(), prompt(0, 900), GREEDY)
    scheduler.step()
    short = scheduler.submit(served.session(), prompt(1, 20), GREEDY)
    scheduler.step()
    assert short.output and not long.output
    scheduler.run_until_idle()
    assert len(long.result()) == len(short.result()) == 7


def test_short_prompts_do_not_starve_a_long_one() -> None:
    served = engine()
    scheduler = Scheduler(served, max_num_batched_tokens=32)
    long = scheduler.submit(served.session(), prompt(0, 300), SamplingConfig(max_new_tokens=1))
    for number in range(60):  # more short prompts than a pass can hold
        if not long.done.is_set():
            scheduler.submit(served.session(), prompt(number, 30), SamplingConfig(max_new_tokens=1))
            scheduler.step()
    assert long.done.is_set()


# What users do wrong.


def test_requests_that_cannot_be_served_are_refused_for_themselves() -> None:
    served, other = engine(), engine("snapkv")
    scheduler = Scheduler(served, max_sessions=1, max_queued=1)
    session = served.session()
    request = scheduler.submit(session, prompt(0, 20), GREEDY)
    with pytest.raises(InputError, match="under way or queued"):
        scheduler.submit(session, [5], GREEDY)
    with pytest.raises(InputError, match="another engine"):
        scheduler.submit(other.session(), [5], GREEDY)
    with pytest.raises(InputError, match="at least one token"):
        scheduler.submit(served.session(), [], GREEDY)
    with pytest.raises(InputError, match="the model takes"):
        scheduler.submit(served.session(), [5] * 100_000, GREEDY)
    scheduler.step()
    scheduler.submit(served.session(), [5], GREEDY)
    with pytest.raises(CapacityError, match="waiting already"):
        scheduler.submit(served.session(), [5], GREEDY)
    with pytest.raises(InputError, match="still being written"):
        list(served.generate(session, [5], GREEDY))
    scheduler.run_until_idle()
    assert session.tokens == alone(served, [prompt(0, 20)]) and len(request.result()) == 7


def test_a_finished_turn_cannot_be_cancelled_and_stays() -> None:
    served = engine()
    scheduler, session = Scheduler(served), served.session()
    request = scheduler.submit(session, prompt(0, 20), GREEDY)
    scheduler.run_until_idle()
    tokens = list(session.tokens)
    scheduler.cancel(request)
    assert not scheduler.step()
    assert session.tokens == tokens and request.error is None


@pytest.mark.parametrize("passes", [0, 1, 2, 4])
def test_a_cancelled_turn_is_taken_back_whole(passes: int) -> None:
    served = engine("snapkv-evict")
    scheduler, session, beside = Scheduler(served, max_num_batched_tokens=16), served.session(), served.session()
    list(served.generate(session, prompt(0, 40), GREEDY))
    before, held = list(session.tokens), session.cache.store_bytes
    kept = scheduler.submit(beside, prompt(2, 20), GREEDY)
    request = scheduler.submit(session, prompt(1, 40), GREEDY)
    for _ in range(passes):
        scheduler.step()
    scheduler.cancel(request)
    scheduler.run_until_idle()
    with pytest.raises(CancelledTurn):
        request.result()
    assert session.tokens == before and session.cache.store_bytes == held and not session.busy
    assert len(kept.result()) == 7


class FailsAt(PrefillSparsifier):
    """Raise for prompts of one length."""

    name: ClassVar[str] = "fails_at"
    paper: ClassVar[str] = ""

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        if inputs.new_tokens == 13 and inputs.layer.index == 1:
            raise RuntimeError("thirteen")
        return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)


def test_an_exception_in_one_session_leaves_the_others_as_they_are() -> None:
    served = TokenEngine(TransformersModel(model()), PolicyStack("test", FailsAt(), FullDecode()))
    scheduler = Scheduler(served, max_num_batched_tokens=WHOLE)
    sessions = [served.session() for _ in range(3)]
    lengths = (30, 13, 21)
    requests = [scheduler.submit(each, prompt(n, lengths[n]), GREEDY) for n, each in enumerate(sessions)]
    scheduler.run_until_idle()
    with pytest.raises(PolicyFault, match="thirteen"):
        requests[1].result()
    assert sessions[1].tokens == [] and sessions[1].cache.seen == 0
    for number in (0, 2):
        assert sessions[number].tokens == alone(served, [prompt(number, lengths[number])])


def test_nan_logits_of_one_session_end_its_turn_alone() -> None:
    served = engine()
    scheduler = Scheduler(served)

    def refuse(logits: torch.Tensor) -> int:
        raise ModelError("not numbers")

    broken, sound = served.session(), served.session()
    failing = scheduler.submit(broken, prompt(0, 12), refuse, max_new_tokens=4)
    fine = scheduler.submit(sound, prompt(1, 12), GREEDY)
    scheduler.run_until_idle()
    with pytest.raises(ModelError, match="not numbers"):
        failing.result()
    assert broken.tokens == [] and fine.result() == alone(served, [prompt(1, 12)])[12:]


def test_memory_is_kept_by_admission_and_idle_sessions_make_way() -> None:
    served = engine()
    first = served.session()
    probe = Scheduler(served, kv_memory=1 << 40)
    needed = probe.ledger.needed(first, 200, 7)
    scheduler = Scheduler(served, kv_memory=int(needed * 1.5))
    with pytest.raises(InputError, match="bytes of KV memory"):
        scheduler.submit(served.session(), prompt(0, 900), GREEDY)
    sessions = [first, served.session(), served.session()]
    requests = [scheduler.submit(each, prompt(n, 200), GREEDY) for n, each in enumerate(sessions)]
    while scheduler.step():
        assert scheduler.running <= 1
        assert sum(each.allocated_bytes for each in sessions) <= scheduler.ledger.limit
    assert all(len(each.result()) == 7 for each in requests)
    again = scheduler.submit(first, prompt(7, 20), GREEDY)  # its store made way and is computed anew
    scheduler.run_until_idle()
    assert again.result() == alone(served, [prompt(0, 200), prompt(7, 20)])[-7:]


@settings(max_examples=15, deadline=None)
@given(
    limit=st.integers(300_000, 900_000),
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 150)), min_size=3, max_size=12),
    stack=st.sampled_from(["dense", "snapkv", "snapkv-evict", "loopserve"]),
)
def test_the_limit_is_never_passed(limit: int, turns: list[tuple[int, int]], stack: str) -> None:
    served = engine(stack)
    scheduler = Scheduler(served, kv_memory=limit, max_num_batched_tokens=64)
    sessions = [served.session() for _ in range(4)]
    for number, (at, size) in enumerate(turns):
        with contextlib.suppress(InputError):  # more than the limit, or a turn of the session is under way
            scheduler.submit(sessions[at], prompt(number, size), GREEDY)
        for _ in range(number % 4):
            scheduler.step()
            assert sum(each.allocated_bytes for each in sessions) <= limit
    while scheduler.step():
        assert sum(each.allocated_bytes for each in sessions) <= limit
    assert scheduler.running == scheduler.waiting == 0


def prefilled(scheduler: Scheduler, served: TokenEngine, tokens: list[int]) -> tuple[Session, torch.Tensor]:
    """Return a session whose turn waits for its answer, and the logits that the answer begins with."""
    request = scheduler.submit(served.session(), tokens, None)
    while not request.done.is_set():
        scheduler.step()
    assert request.turn is not None and request.turn.logits is not None
    return request.session, request.turn.logits


def test_forks_do_not_wait_behind_one_that_waits_for_their_memory() -> None:
    served = engine()
    probe = Scheduler(served, kv_memory=1 << 40)
    limit = probe.ledger.needed(served.session(), 900, 7)
    scheduler = Scheduler(served, kv_memory=limit)
    session, logits = prefilled(scheduler, served, prompt(0, 100))
    scheduler.make_space_for_forks(session, 3, 7)
    large = scheduler.submit(served.session(), prompt(1, 900), GREEDY)  # needs the whole limit
    answers = [
        scheduler.submit(each, (), GREEDY, logits=logits) for each in (session, *(session.fork() for _ in range(2)))
    ]
    for _ in range(200):
        scheduler.step()
        for each in answers:
            if each.done.is_set():
                each.session.close()
    assert all(len(each.result(0)) == 7 for each in [*answers, large])


def test_forks_that_never_fit_are_refused_and_others_wait_their_turn() -> None:
    served = engine()
    probe = Scheduler(served, kv_memory=1 << 40)
    scheduler = Scheduler(served, kv_memory=2 * probe.ledger.needed(served.session(), 100, 7))
    session, logits = prefilled(scheduler, served, prompt(0, 100))
    with pytest.raises(InputError, match="9 answers to one request may need"):
        scheduler.make_space_for_forks(session, 9, 7)
    most = max(count for count in range(1, 9) if _fits(scheduler, session, count))
    held, growth = session.allocated_bytes, probe.ledger.needed(session, 0, 7) - session.allocated_bytes
    assert most * held + growth <= scheduler.ledger.limit < (most + 1) * held + growth
    answers = [scheduler.submit(session.fork(), (), GREEDY, logits=logits) for _ in range(most - 1)]
    with pytest.raises(CapacityError, match="2 answers to one request do not fit the KV memory now"):
        scheduler.make_space_for_forks(session, 2, 7)
    scheduler.run_until_idle()
    assert all(len(each.result()) == 7 for each in answers)


def _fits(scheduler: Scheduler, session: Session, count: int) -> bool:
    try:
        scheduler.make_space_for_forks(session, count, 7)
    except InputError:
        return False
    return True


# A bound on the time of a pass, by a clock that counts what passes hold.


class Timed(TokenEngine):
    """Take a second for each pass, and a tenth for each prompt token."""

    now = 0.0

    def run_pass(self, turns: Any, prefill_tokens: Any = None) -> None:
        waiting = sum(each.waiting for each in turns)
        super().run_pass(turns, prefill_tokens)
        self.now += 1 + 0.1 * max(0, waiting - sum(each.waiting for each in turns))


def timed_passes(scheduler: Scheduler, served: Timed) -> Iterator[float]:
    """Run passes until nothing is left, and give the seconds of each."""
    while True:
        before = served.now
        if not scheduler.step():
            return
        yield served.now - before


def timed(**options: Any) -> tuple[Timed, Scheduler]:
    served = Timed(TransformersModel(model()), load_stack("dense"))
    return served, Scheduler(served, max_num_batched_tokens=512, clock=lambda: served.now, **options)


def test_passes_are_short_while_short_messages_come() -> None:
    served, scheduler = timed(max_pass_steps=6)
    scheduler.submit(served.session(), prompt(0, 20), GREEDY)
    scheduler.run_until_idle()  # so that passes are measured
    long = scheduler.submit(served.session(), prompt(1, 900), GREEDY)
    scheduler.submit(served.session(), prompt(2, 20), GREEDY)
    seconds: list[float] = []
    for number, each in enumerate(timed_passes(scheduler, served)):
        seconds.append(each)
        if number % 5 == 0 and long.turn is not None and long.turn.waiting:
            scheduler.submit(served.session(), prompt(number, 20), GREEDY)
    assert long.done.is_set()
    assert max(seconds) <= 6 and len(seconds) < 40


def test_short_messages_come_in_beside_many_that_decode() -> None:
    served, scheduler = timed(max_pass_steps=1.5)
    for number in range(6):
        scheduler.submit(served.session(), prompt(number, 20), GREEDY)
    scheduler.run_until_idle()
    long = scheduler.submit(served.session(), prompt(9, 400), GREEDY)
    decoding = [scheduler.submit(served.session(), prompt(number, 16), GREEDY) for number in range(6)]
    while not all(each.output for each in decoding):
        scheduler.step()
    short = scheduler.submit(served.session(), prompt(8, 8), GREEDY)
    for _ in range(2):
        scheduler.step()
    assert short.output and long.turn is not None and long.turn.waiting


def test_the_first_passes_of_a_server_are_short_while_requests_overlap() -> None:
    served, scheduler = timed(max_pass_steps=6)
    scheduler.submit(served.session(), prompt(1, 900), GREEDY)
    scheduler.submit(served.session(), prompt(2, 20), GREEDY)
    assert scheduler.step()
    assert served.now < 8


@pytest.mark.parametrize("options", [{}, {"max_pass_steps": 6}])
def test_a_lone_prompt_is_computed_in_large_pieces(options: dict[str, Any]) -> None:
    served, scheduler = timed(**options)
    for number in range(3):
        scheduler.submit(served.session(), prompt(number, 1000), GREEDY)
        assert [round(each, 1) for each in timed_passes(scheduler, served)] == [52.2, 49.8, *[1.0] * 6]


def test_large_pieces_come_back_when_the_others_stay_away() -> None:
    served, scheduler = timed(max_pass_steps=6)
    for number in range(2):
        scheduler.submit(served.session(), prompt(number, 20), GREEDY)
    scheduler.run_until_idle()
    scheduler.submit(served.session(), prompt(2, 900), GREEDY)
    seconds = list(timed_passes(scheduler, served))
    assert max(seconds[:3]) <= 6 and max(seconds) > 10


def test_requests_come_from_other_threads() -> None:
    served = engine()
    scheduler = Scheduler(served)
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = scheduler.submit(served.session(), prompt(number, 15 + number), GREEDY).result(timeout=60)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if scheduler.wait_for_work(timeout=0.05):
            scheduler.step()
    assert found == {n: alone(served, [prompt(n, 15 + n)])[15 + n :] for n in range(6)}


def test_values_that_make_no_sense_are_refused() -> None:
    for options in (
        {"max_sessions": 0},
        {"max_num_batched_tokens": 0},
        {"max_queued": -1},
        {"kv_memory": 0},
        {"max_pass_steps": 0},
        {"max_pass_steps": float("inf")},
        {"max_pass_steps": float("nan")},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Scheduler(engine(), **options)
