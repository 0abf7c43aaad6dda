"""The loop carries out no selection that its policy may not make."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.errors import PolicyError
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import DecodeCompressor, Observation, Step
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
