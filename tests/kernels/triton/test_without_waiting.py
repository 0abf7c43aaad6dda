"""No step on the way to a kernel waits for the device. Seen without one: the operations that would wait are refused
while launches are recorded. On a GPU, ``tests/gpu`` asks PyTorch itself.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.triton.ahead import recorded
from tests.kernels.triton.calls import Call, attention, call, others, paged, variants

# Reading a number, results whose size depends on numbers, numbers of the host brought to the device.
WAITING = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.masked_select",
    "aten.bincount",
    "aten._unique2",
    "aten.unique_dim",
    "aten.repeat_interleave.Tensor",
    "aten.lift_fresh",
    "aten.scalar_tensor",
    "aten.equal",
)


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(function).startswith(WAITING), f"{function} waits for the device"
        if str(function).startswith("aten.index"):
            kinds = {each.dtype for each in args[1] if isinstance(each, torch.Tensor)} if len(args) > 1 else set()
            assert torch.bool not in kinds, f"{function} by a mask waits for the device"
        return function(*args, **(kwargs or {}))


CALLS = [*attention(torch.bfloat16, 64), *attention(torch.float16, 64, first_valid=torch.zeros(2, dtype=torch.long))]
CALLS += [*variants(torch.bfloat16, 64), *others(), *paged(torch.bfloat16, 64)]


@pytest.mark.parametrize("one", CALLS, ids=lambda one: one[0])
def test_nothing_waits(one: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(tensor: torch.Tensor) -> list[Any]:
        raise AssertionError("tolist waits for the device")

    monkeypatch.setattr(torch.Tensor, "tolist", refused)
    with recorded(90), Refusing():
        call(*one)()


def test_what_waits_is_refused() -> None:
    numbers = torch.ones(3)
    for waits in (
        lambda: bool(numbers.any()),
        lambda: numbers[numbers > 0],
        lambda: torch.where(numbers > 0, numbers, 0.0),
        lambda: torch.tensor(3),
    ):
        with Refusing(), pytest.raises(AssertionError, match="waits"):
            waits()


def test_triton_is_imported_only_when_needed() -> None:
    program = (
        "import sys; from loopserve.kernels import backend; backend.operations(); sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
