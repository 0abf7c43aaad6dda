"""What other threads and a busy machine do is no fault of a policy, and is not undone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loopserve.bench.quality.records import RecordFile, error_record, is_asked_again, read_records
from loopserve.core.errors import Fault, PolicyFault
from loopserve.core.guard.guard import Guard
from loopserve.core.stack.stack import PolicyStack
from loopserve.policies.decode.full import FullDecode
from tests.core.faulty import MARKED, Windowed
from tests.faults.models import answer, engine, tiny, tokens


@pytest.fixture(autouse=True)
def _switches_as_before() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def elsewhere(work: Any) -> None:
    """Run something to its end in another thread."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def acting(act: Any, **guard: Any) -> list[int]:
    """The answer under a sparsifier during whose calls something happens."""

    def during(_: Any, inputs: Any, pattern: Any, call: int) -> Any:
        act()
        return pattern

    served = engine(tiny(), PolicyStack("sparse", Windowed(during), FullDecode()))
    served.guard = Guard(**guard)
    return answer(served, served.session(), tokens(MARKED), 4)


@pytest.mark.parametrize("on_fault", ["raise", "dense"])
def test_switches_turned_by_another_thread_stay_turned_and_blame_nobody(on_fault: str) -> None:
    wanted = acting(lambda: None)
    assert acting(lambda: elsewhere(lambda: torch.set_default_dtype(torch.float64)), on_fault=on_fault) == wanted
    assert torch.get_default_dtype() is torch.float64


def test_strict_checks_name_the_switch_and_leave_it() -> None:
    with pytest.raises(PolicyFault, match="switch of the whole process") as raised:
        acting(lambda: torch.set_default_dtype(torch.float64), checks="strict")
    assert raised.value.fault is Fault.HIDDEN
    assert torch.get_default_dtype() is torch.float64


def test_a_pause_is_no_fault() -> None:
    """The limit is of the thread's processor time, of which a pause takes none."""
    clock = {"now": 0.0}

    def pause() -> None:
        clock["now"] += 3600.0

    assert acting(pause, clock=lambda: clock["now"]) == acting(lambda: None)
    assert Guard()._worked is time.thread_time


def test_a_dialogue_lost_to_the_time_limit_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    stack = {"stack": "a", "family": "a", "digest": "d"}
    turns = [{**stack, "task": "t", "sample": "0", "turns": 2, "turn": turn, "score": 1.0} for turn in range(2)]
    lost = error_record(stack, "t", "0", "slow", "it took 6.0 s")
    other = error_record(stack, "t", "1", "failed", "out of memory")
    assert is_asked_again(lost) and not is_asked_again(other) and not is_asked_again(turns[0])
    file = RecordFile(path)
    for records in ([lost], [lost], [other]):
        file.append(records)
    file.close()
    assert read_records(path) == [lost, other]
    file = RecordFile(path)
    file.append(turns)
    assert file.records == [other, *turns]
    file.close()
    assert read_records(path) == [other, *turns]
