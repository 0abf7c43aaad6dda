"""R5: the limit on KV memory is never passed, whatever is sent, cancelled, forked, undone and closed, in any order."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from loopserve.api import load_stack
from loopserve.bench.budget import with_budget
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.scheduler import Request, Scheduler
from loopserve.core.errors import CancelledTurn, CapacityError, InputError
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import VOCABULARY, tiny_model
from tests.soak.cases import Cases

LIMIT = 1 << 20
STEPS = 50
STACKS = ("dense", "loopserve", "snapkv", "snapkv-evict", "h2o")


def run(cases: int, seed: int = 0) -> Cases:
    """Take at least ``cases`` steps, about three times as many; each is one case, with the limit looked at after it."""
    found = Cases()
    Machine.steps = Machine.waited = Machine.most = 0
    limits = settings(
        max_examples=max(1, cases // STEPS),
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    with found.case("all steps"):
        run_state_machine_as_test(seeded(seed)(Machine), settings=limits)
    found.count = Machine.steps
    found.figures = {"most_used_share": Machine.most / LIMIT, "requests_that_waited": Machine.waited}
    return found


@cache
def token_engine() -> TokenEngine:
    model = tiny_model("llama")
    set_implementation(model, IMPLEMENTATION)
    return TokenEngine(TransformersModel(model), with_budget(load_stack("dense"), 48))


@cache
def stack(name: str) -> Any:
    return with_budget(load_stack(name), 48)


class Machine(RuleBasedStateMachine):
    """Sessions under several stacks in one scheduler with little memory."""

    steps: ClassVar[int] = 0
    waited: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            token_engine(), max_sessions=4, max_queued=6, kv_memory=LIMIT, max_num_batched_tokens=256
        )
        self.sessions: list[Any] = []
        self.requests: list[Request] = []

    @rule(name=st.sampled_from(STACKS))
    def open(self, name: str) -> None:
        self.sessions.append(token_engine().session(stack(name)))

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 30), tokens=st.integers(1, 400), most=st.integers(1, 60))
    def send(self, pick: int, tokens: int, most: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        new = torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(pick)).tolist()
        try:
            self.requests.append(self.scheduler.submit(session, new, SamplingConfig(max_new_tokens=most)))
        except (InputError, CapacityError):
            return

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.step()
            self._within_limit()

    @precondition(lambda self: self.requests)
    @rule(pick=st.integers(0, 30))
    def cancel(self, pick: int) -> None:
        self.scheduler.cancel(self.requests[pick % len(self.requests)])

    @precondition(lambda self: self.sessions)
    @rule(pick=st.integers(0, 30), act=st.sampled_from(["fork", "undo", "release", "close"]))
    def manage(self, pick: int, act: str) -> None:
        session = self.sessions[pick % len(self.sessions)]
        if session.busy or any(each.session is session and not each.done.is_set() for each in self.requests):
            return
        if act == "fork" and self.scheduler.ledger.make_space(2 * session.allocated_bytes, session):
            self.sessions.append(session.fork())
        elif act == "undo" and session.turns:
            session.undo()
        elif act == "release":
            session.release_store()
        elif act == "close":
            session.close()
            self.sessions.remove(session)

    @invariant()
    def _within_limit(self) -> None:
        Machine.steps += 1
        Machine.waited += self.scheduler.waiting
        held = sum(each.allocated_bytes for each in self.sessions)
        Machine.most = max(Machine.most, held)
        assert held <= LIMIT, f"{held} bytes are held, the limit is {LIMIT}"
        assert self.scheduler.ledger.used <= LIMIT
        for each in self.requests:
            assert each.error is None or isinstance(each.error, CancelledTurn), each.error
        self.requests = [each for each in self.requests if not each.done.is_set()]

    def teardown(self) -> None:
        self.scheduler.close()
        assert not self.scheduler.running and not self.scheduler.waiting
        assert not self.scheduler.ledger._reserved
        for each in self.sessions:
            each.close()
