"""Faults of policies under ``loopserve.apply``, where the forward pass is the caller's."""

from __future__ import annotations

import pytest
import torch

import loopserve
from loopserve.core.errors import PolicyFault
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.tiny import tiny_model
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.prefill.dense import DensePrefill
from tests.core.acts import COMPRESSOR, SPARSIFIER
from tests.core.fault_matrix import OTHER, prompt
from tests.core.faulty import MARKED, Halving, Windowed


def answers(stack: PolicyStack, **options: str) -> tuple[list[list[int]], list[float]]:
    """What two rows of a padded batch answer (the second one is marked), and the faults counted in each."""
    model = tiny_model("llama")
    rows = [prompt(OTHER), prompt(MARKED)]
    ids = torch.tensor([[0] * (MARKED - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (MARKED - len(row)) + [1] * len(row) for row in rows])
    with loopserve.apply(model, stack, **options) as applied:  # type: ignore[arg-type]
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        faults = [row[-1].as_dict()["faults"] for row in applied.stats]
    return found[:, MARKED:].tolist(), faults


@pytest.mark.parametrize(
    "stack",
    [
        PolicyStack("sparse", Windowed(SPARSIFIER["wrong shape"]), FullDecode()),
        PolicyStack("sparse", DensePrefill(), Halving(COMPRESSOR["over budget"])),
    ],
    ids=["prefill", "decode"],
)
def test_only_the_faulty_row_of_a_batch_is_served_dense(stack: PolicyStack) -> None:
    found, faults = answers(stack, on_policy_fault="dense")
    sound = PolicyStack("sound", type(stack.prefill)(), type(stack.decode)())
    assert faults == [0, 1]
    assert found[0] == answers(sound)[0][0]
    assert found[1] == answers(PolicyStack("dense", DensePrefill(), FullDecode()))[0][1]
    with pytest.raises(PolicyFault):
        answers(stack)


def test_a_damaged_store_always_raises() -> None:
    stack = PolicyStack("writes", DensePrefill(), Halving(COMPRESSOR["writes into its inputs"]))
    with pytest.raises(PolicyFault, match="it wrote into its inputs"):
        answers(stack, on_policy_fault="dense")


def test_inference_mode_counts_no_writes_and_serves_all_the_same() -> None:
    stack = PolicyStack("sound", Windowed(), Halving())
    with torch.inference_mode():
        found, faults = answers(stack)
    assert faults == [0, 0] and found == answers(stack)[0]
