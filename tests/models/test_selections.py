"""The loop carries out no selection that its policy may not make."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.scheduler import Scheduler
from loopserve.core.errors import PolicyError
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.kv.selection_request import SelectionRequest
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Step
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.policies.prefill.dense import DensePrefill


class Wishes(DecodeCompressor[None]):
    """Answers every forward pass with the same wish."""

    name: ClassVar[str] = "wishes"
    paper: ClassVar[str] = ""
    wish: Any = None

    def init_state(self) -> None:
        return None

    def after_forward(self, step: Step, state: None) -> Any:
        return self.wish


def some(retention: Retention = Retention.KEEP) -> KVSelection:
    return KVSelection.uniform(torch.tensor([[0, 2]] * 2), 4, retention)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({9: some()}, r"'wishes'.*: selected for layer 9, but it selects for the layers \[0, 1, 2\]"),
        ({0: some(Retention.EVICT)}, "a selection says evict, the policy declares keep"),
        ({0: KVSelection.uniform(torch.tensor([[2, 0]] * 2), 4)}, "sorted and unique"),
        (Observation(torch.tensor([1])), "may not ask for another"),
    ],
)
def test_a_wish_that_breaks_the_contract_is_named(llama: PreTrainedModel, wish: Any, says: str) -> None:
    policy = Wishes()
    policy.wish = wish
    set_implementation(llama, IMPLEMENTATION)
    engine = TokenEngine(TransformersModel(llama), PolicyStack("test", DensePrefill(), policy))
    session = engine.session()
    with pytest.raises(PolicyError, match=says):
        engine.prefill(session, [3, 4, 5, 6, 7])


def test_a_selection_is_what_decoding_attends_to(llama: PreTrainedModel) -> None:
    policy = Wishes()
    policy.wish = {layer: some() for layer in range(3)}
    set_implementation(llama, IMPLEMENTATION)
    engine = TokenEngine(TransformersModel(llama), PolicyStack("test", DensePrefill(), policy))
    session = engine.session()
    list(engine.generate(session, [3, 4, 5, 6, 7], lambda _: 8, max_new_tokens=2))
    # Two selected pairs, the fifth token behind the boundary, and the new one, for each of two KV heads and three layers.
    assert session.stats.means["attended_pairs"].value == 2 * (2 + 1 + 1)
    assert session.stats.means["attended_fraction"].value == pytest.approx(4 / 6)
    assert session.stats.compressed_steps == 1


class Requests(DecodeCompressor[dict[int, KeySummaries]]):
    """Asks in every step for the first two pairs and the best three others by codes of the keys."""

    name: ClassVar[str] = "requests"
    paper: ClassVar[str] = ""
    changed: ClassVar[dict[str, Any]] = {}

    def init_state(self) -> dict[int, KeySummaries]:
        return {}

    def before_attention(self, inputs: AttentionInputs, state: dict[int, KeySummaries]) -> SelectionRequest:
        base = KVSelection.uniform(torch.tensor([[0, 1]] * inputs.kv_heads), inputs.length - 1, fleeting=True)
        request = inputs.request_selection(state, 8, 4, base, most=3)
        request.choice = request.choice._replace(**self.changed)
        return request


class Broken(Requests):
    """Asks for a column that is not there."""

    name: ClassVar[str] = "broken"
    changed: ClassVar[dict[str, Any]] = {"base": torch.tensor([[0, 10**6]] * 2)}


class Asks(Requests):
    """Makes the same selections itself, step by step."""

    name: ClassVar[str] = "asks"

    def before_attention(self, inputs: AttentionInputs, state: dict[int, KeySummaries]) -> Any:
        return super().before_attention(inputs, state).make()


def answers(model: PreTrainedModel, policy: DecodeCompressor[Any], *, together: bool) -> list[list[int]]:
    set_implementation(model, IMPLEMENTATION)
    engine = TokenEngine(TransformersModel(model), PolicyStack("test", DensePrefill(), policy))
    scheduler, found = Scheduler(engine), []
    for number in range(3):
        prompt = [3 + (number + token) % 20 for token in range(12 + 9 * number)]
        found.append(scheduler.submit(engine.session(), prompt, SamplingConfig(max_new_tokens=8)))
        if not together:
            scheduler.run_until_idle()
    scheduler.run_until_idle()
    return [each.result() for each in found]


def test_requested_selections_are_made_for_all_sessions_of_a_pass(llama: PreTrainedModel) -> None:
    alone = answers(llama, Asks(), together=False)
    assert answers(llama, Requests(), together=True) == alone
    assert answers(llama, Requests(), together=False) == alone
    assert answers(llama, Wishes(), together=True) != alone  # every pair is attended there


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"most": 99}, "99 more than"),
        ({"least": 4}, "at least 4 and at most 3"),
        ({"observed": torch.zeros(1, 2)}, "observed"),
        ({"tail": 3}, "tail 3 is not the base's boundary"),
        ({"base": torch.tensor([[0, 10**6]] * 2)}, "are not those of the request"),
        ({"queries": torch.zeros(64, 1, 8)}, "are not the layer's"),
    ],
)
def test_a_request_that_does_not_fit_is_the_policy_s_fault(
    llama: PreTrainedModel, changed: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Requests, "changed", changed)
    with pytest.raises(PolicyError, match=rf"'requests'.*{says}"):
        answers(llama, Requests(), together=False)


def test_a_bad_request_ends_its_own_session_alone(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``on_policy_fault: dense`` it answers without the policy, the others as if it were not there."""
    set_implementation(llama, IMPLEMENTATION)
    stack = PolicyStack("test", DensePrefill(), Requests())
    engine = TokenEngine(TransformersModel(llama), stack, on_policy_fault="dense")
    prompts = [[3 + (number + token) % 20 for token in range(12 + 9 * number)] for number in range(3)]
    alone = answers(llama, Asks(), together=False)
    bad = PolicyStack("bad", DensePrefill(), Broken())
    scheduler = Scheduler(engine)
    sessions = [engine.session(), engine.session(stack=bad), engine.session()]
    found = [
        scheduler.submit(each, ids, SamplingConfig(max_new_tokens=8))
        for each, ids in zip(sessions, prompts, strict=True)
    ]
    scheduler.run_until_idle()
    assert [each.result() for each in found][::2] == alone[::2]
    assert found[1].result() == answers(llama, Wishes(), together=False)[1]
    assert sessions[1].stats.as_dict()["faults"] and not sessions[0].stats.as_dict()["faults"]


def test_numbers_written_into_a_selection_after_its_check_are_noticed() -> None:
    selection = some()
    selection.check(2, 5)
    selection.check(2, 5)
    selection.indices[1, 0] = 7
    with pytest.raises(PolicyError, match=r"sorted and unique|must lie in"):
        selection.check(2, 5)
