"""A policy that breaks its contract harms its own request at most: the fault matrix, and what surrounds it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.errors import ConfigError, Fault, PolicyFault
from loopserve.core.guard.guard import BREAKER_FAULTS, COOL_DOWN_S, Guard
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import Phase
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.prefill.dense import DensePrefill
from tests.core import fault_matrix as matrix
from tests.core.acts import CLOCK, COMPRESSOR, SPARSIFIER
from tests.core.fault_matrix import ANSWER, OTHER, alone, engine, prompt, steps
from tests.core.faulty import MARKED, Halving, Windowed

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
KINDS = {
    "raises at its first call": Fault.RAISED,
    "raises at call 2": Fault.RAISED,
    "exits the program": Fault.RAISED,
    "over budget": Fault.BUDGET,
    "NaN": Fault.NAN,
    "writes into its inputs": Fault.WROTE,
    "writes into its positions": Fault.WROTE,
    "writes past the counter": Fault.WROTE,
    "writes into its positions past the counter": Fault.WROTE,
    "keeps a reference in its state": Fault.KEPT,
    "keeps a reference in itself": Fault.KEPT,
    "hidden global state": Fault.HIDDEN,
    "draws from the process's random numbers": Fault.HIDDEN,
    "turns a switch of the process": Fault.HIDDEN,
    "sleeps 10 s": Fault.SLOW,
}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING, "loopserve")
    yield
    torch.set_default_dtype(torch.float32)  # the guard turns nothing back


@pytest.mark.parametrize(("fault", "interface"), matrix.CASES, ids=lambda each: each.replace(" ", "-"))
def test_a_fault_is_named_or_served_dense_and_no_other_session_notices(fault: str, interface: str) -> None:
    row = matrix.row(fault, interface)
    assert row.other == (True, True)
    assert row.dense != "another answer" and row.faults == 1
    raised = row.raised
    assert raised is not None and raised.fault is KINDS.get(fault, Fault.ANSWER)
    assert raised.phase in list(Phase) and str(raised).startswith(f"{interface} policy '{raised.policy}' (")


def test_the_page_of_faults_is_current() -> None:
    page = PAGE.read_text("utf-8")
    assert matrix.renewed(page) == page, f"run: python -m tests.core.fault_matrix {PAGE.name}"


@pytest.mark.parametrize(
    ("fault", "interface"), [(fault, each) for fault, found in matrix.STRICT_ONLY.items() for each in sorted(found)]
)
def test_what_cheap_checks_do_not_see_stays_in_its_session(fault: str, interface: str) -> None:
    reference = alone(engine(*(matrix._sound(each) for each in matrix.policies(interface, fault))), OTHER)
    beside, _, marked = matrix.side_by_side(engine(*matrix.policies(interface, fault), checks="cheap"))
    assert torch.equal(beside, reference)
    assert marked.stats.as_dict()["faults"] == 0


def test_the_third_fault_in_a_minute_keeps_a_policy_from_being_called(caplog: pytest.LogCaptureFixture) -> None:
    served = engine(Windowed(SPARSIFIER["raises at its first call"]), FullDecode())
    before = steps(served, served.session(), OTHER)
    next(before)
    for _ in range(BREAKER_FAULTS):
        alone(served, MARKED)
    said = [each.message for each in caplog.records]
    assert len(said) == BREAKER_FAULTS + 1 and "had 3 faults within 60 s" in said[-1]
    session = served.session()
    assert torch.equal(
        torch.stack(list(steps(served, session, OTHER))), alone(engine(DensePrefill(), FullDecode()), OTHER)
    )
    assert session.stats.counters["breaker_open"] == 1 and session.stats.as_dict()["faults"] == 0
    # A turn that was under way when it opened goes on with the policy: nothing of it may change.
    sparse = alone(engine(Windowed(), FullDecode()), OTHER)
    assert torch.equal(torch.stack(list(before)), sparse[1:])
    assert len(caplog.records) == len(said)
    CLOCK.now += COOL_DOWN_S
    assert torch.equal(alone(served, OTHER), sparse)


def test_faults_far_apart_open_nothing() -> None:
    served = engine(Windowed(SPARSIFIER["wrong type"]), FullDecode())
    for _ in range(2 * BREAKER_FAULTS):
        alone(served, MARKED)
        CLOCK.now += 31.0
    assert not served.guard.skips(served.stack.prefill)


@pytest.mark.parametrize("fault", ["writes into its inputs", "unsorted", "raises at its first call"])
def test_a_raised_fault_takes_its_turn_back_and_the_conversation_goes_on(fault: str) -> None:
    """The first turn is healthy, the second one's fault is raised; what follows is as if nothing had happened, or, where the store
    was damaged, as in a new session that is given the whole conversation.
    """
    act = COMPRESSOR[fault]

    def later(moment: str, policy: Any, subject: Any, state: Any, answer: Any, call: int) -> Any:
        healthy = moment == "init_state" or subject.turn != 1 or state.get("spared")
        return answer if healthy else act(moment, policy, subject, state, answer, call)

    said, outcomes = SamplingConfig(max_new_tokens=ANSWER), []
    for each in (later, None):
        served = engine(DensePrefill(), Halving(each), on_fault="raise")
        session = served.session()
        answers = [list(served.generate(session, prompt(MARKED), said, frozenset()))]
        if each is not None:
            tokens = list(session.tokens)
            with pytest.raises(PolicyFault):
                list(served.generate(session, prompt(9), said, frozenset()))
            assert session.tokens == tokens and len(session.turns) == 1
            for state in session.states.values():
                state["spared"] = True
            served.stack.decode.act = None
            damaged = not session.cache.seen
        elif damaged:
            session = served.session()
            answers.append(list(served.generate(session, tokens + prompt(9), said, frozenset())))
            outcomes.append(answers)
            continue
        answers.append(list(served.generate(session, prompt(9), said, frozenset())))
        outcomes.append(answers)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("on_fault", ["raise", "dense"])
def test_a_write_through_a_kept_reference_is_found_by_the_session_it_hit(on_fault: str) -> None:
    kept: list[torch.Tensor] = []

    def act(moment: str, policy: Any, subject: Any, state: Any, answer: Any, call: int) -> Any:
        if moment == "after_attention":
            kept.append(subject.keys)
        return answer

    served = engine(DensePrefill(), Halving(act), on_fault=on_fault)
    session = served.session()
    running = steps(served, session, MARKED)
    found = [next(running), next(running)]
    kept[0].zero_()
    if on_fault == "raise":
        with pytest.raises(PolicyFault, match="has kept a reference"):
            next(running)
        assert session.tokens == [] and session.cache.seen == 0
        return
    found += list(running)
    assert session.stats.counters["computed_anew"] == 1
    # From there on as a dense engine goes on that is given the conversation so far.
    dense = engine(DensePrefill(), FullDecode())
    expected: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> int:
        expected.append(logits)
        return int(logits.argmax())

    asked = prompt(MARKED) + [int(each.argmax()) for each in found[:2]]
    list(dense.generate(dense.session(), asked, choose, max_new_tokens=len(found) - 2))
    assert torch.equal(torch.stack(found[2:]), torch.stack(expected))


def test_after_an_eviction_dense_means_all_survivors() -> None:
    act = COMPRESSOR["raises at call 2"]
    served = engine(DensePrefill(), Halving(act, Halving.Config(retention=Retention.EVICT)))
    session = served.session()
    list(steps(served, session, MARKED))
    stats = session.stats.as_dict()
    assert stats["faults"] == 1 and session.cache.layers[0].active is None
    assert session.cache.layers[0].stored == 12 + ANSWER - 1  # the budget and the outputs computed


class Broken(Halving):
    """Fails in the moments that no session is needed for."""

    name = "broken"
    paper = ""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def init_state(self) -> dict[str, Any]:
        if self.where == "init_state":
            raise RuntimeError("no state")
        return {"lock": (each for each in ())} if self.where == "copy" else {}

    def end_turn(self, state: dict[str, Any]) -> None:
        if self.where == "end_turn":
            raise RuntimeError("nothing to let go of")

    def held_bytes(self, state: Any) -> Any:
        return "many" if self.where == "held_bytes" else 0


@pytest.mark.parametrize(
    ("where", "moment"),
    [("init_state",) * 2, ("end_turn",) * 2, ("copy", "a copy of its state"), ("held_bytes",) * 2],
)
def test_a_state_that_cannot_be_had_is_a_fault_too(where: str, moment: str) -> None:
    said = SamplingConfig(max_new_tokens=ANSWER)
    served = engine(DensePrefill(), Broken(where), on_fault="raise")
    session = served.session()
    with pytest.raises(PolicyFault, match="decode policy 'broken'") as raised:
        list(served.generate(session, prompt(OTHER), said, frozenset()))
    assert raised.value.moment == moment and session.tokens == []
    # Where it fails at a turn's end, its answer is given already, and the next turn has a fresh state.
    healthy = engine(DensePrefill(), Halving() if where == "end_turn" else FullDecode())
    answers = []
    for each in (engine(DensePrefill(), Broken(where)), healthy):
        session = each.session()
        answers.append(list(each.generate(session, prompt(OTHER), said, frozenset())))
        answers.append(list(each.generate(session, prompt(9), said, frozenset())))
    assert answers[:2] == answers[2:]


def test_the_next_turn_gives_a_policy_another_chance() -> None:
    def act(_: Any, inputs: Any, pattern: Any, call: int) -> Any:
        return None if inputs.turn == 0 else pattern

    served = engine(Windowed(act), FullDecode())
    session = served.session()
    list(steps(served, session, MARKED))
    list(steps(served, session, 9))
    first, second = (each.as_dict() for each in session.turns)
    assert (first["faults"], second["faults"]) == (1, 0)
    assert first["prefill_cell_density"] == 1.0 > second["prefill_cell_density"]


def test_the_first_call_of_a_method_is_not_timed() -> None:
    """Kernels are compiled then."""
    alone_first = engine(Windowed(SPARSIFIER["sleeps 10 s"]), FullDecode(), on_fault="raise")
    with pytest.raises(PolicyFault, match=r"it took 10\.0 s of processor time, the limit is 5 s") as raised:
        alone(alone_first, MARKED)
    assert raised.value.layer == 1


@pytest.mark.parametrize(
    "options", [{"checks": "lax"}, {"on_fault": "ignore"}, {"timeout_s": 0.0}, {"timeout_s": float("nan")}]
)
def test_unknown_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"policy_checks|policy_timeout_s"):
        Guard(**options)
