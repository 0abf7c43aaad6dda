"""A work list names every step of every row once, and never writes past the capacity it reports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopserve.kernels.gpu import work
from loopserve.kernels.gpu.work import work_list


@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 12), st.integers(0, 5000)), min_size=1, max_size=80),
    st.integers(1, 9),
)
def test_every_step_is_done_once(steps: list[int], processors: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "processors", lambda device: processors)
        made = work_list(torch.tensor(steps, dtype=torch.int32))
    count = int(made.count)
    assert count <= len(made.items)
    items = made.items[:count].tolist()
    lengths = [end - begin for _, begin, end, _ in items]
    assert lengths == sorted(lengths, reverse=True)
    done: dict[int, list[int]] = {row: [] for row in range(len(steps))}
    parts: dict[int, int] = {}
    for row, begin, end, part in items:
        done[row] += range(begin, end)
        if part >= 0:
            assert part not in parts and part < made.parts
            parts[part] = row
    for row, wanted in enumerate(steps):
        assert sorted(done[row]) == list(range(wanted))
        first, number = int(made.first_part[row]), int(made.part_count[row])
        assert number == sum(item[0] == row for item in items)
        if number > 1:
            assert [parts[each] for each in range(first, first + number)] == [row] * number
    fair = max(-(-sum(steps) // (2 * processors)), 8)
    assert max(lengths) <= fair  # no program is left with a row that others wait for
