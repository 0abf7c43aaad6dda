"""Choices of several sessions by one kernel call: each is what the session alone gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.core.errors import PolicyError
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels import backend
from loopserve.kernels.choose_columns import ColumnChoice, choose_columns
from loopserve.kernels.key_codes import code_jumps, code_threshold
from tests.kernels.cases import IMPLEMENTATIONS

DIM, HEADS, GROUP = 64, 2, 3


def session(seed: int, total: int, held: int, *, page: int, bits: int, dtype: torch.dtype, **options: Any) -> Any:
    """Return a function that makes a choice over ``total`` keys, of which ``held`` are summarised, and that choice's parts."""
    source = torch.Generator().manual_seed(seed)
    keys = torch.randn(HEADS, total, DIM, generator=source, dtype=torch.float32).to(dtype)
    packed = torch.randn(HEADS * GROUP, 3, DIM, generator=source, dtype=torch.float32).to(dtype)
    tail = total - 2
    base = torch.stack([torch.randperm(tail, generator=source)[:5].sort().values for _ in range(HEADS)])

    def made() -> tuple[KeySummaries, ColumnChoice]:
        pages = KeySummaries(page, bits)
        if held:
            pages.update(keys[:, :held])
        first = pages.prepare(keys)
        assert first is not None
        observed = torch.zeros(HEADS, tail, dtype=torch.float32)
        queries = packed[:, 1:2]  # a part of a packed row, as in a pass
        return pages, ColumnChoice(
            queries, pages.keys_coded, base, tail, observed=observed, keys=keys, first=first, **options
        )

    return made, keys


RULES = st.sampled_from(
    [{"most": 4}, {"most": 0}, {"most": 9, "least": 2, "threshold": -3.0}, {"most": 6, "threshold": -1.0}]
)


@given(
    sizes=st.lists(st.tuples(st.integers(16, 150), st.floats(0, 0.99), RULES), min_size=1, max_size=5),
    page=st.sampled_from([1, 16, 32]),
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_together_is_alone_and_summarises_what_is_new(
    sizes: list[tuple[int, float, dict[str, Any]]], page: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    sessions = [
        session(seed + number, total, int(total * share), page=page, bits=bits, dtype=dtype, **rule)
        for number, (total, share, rule) in enumerate(sizes)
    ]
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            together = [made() for made, _ in sessions]
            found = choose_columns([choice for _, choice in together], scaling=0.3)
            for (made, keys), (columns, counts), (pages, choice) in zip(sessions, found, together, strict=True):
                alone = KeySummaries(page, bits)
                alone.update(keys)
                pages.confirm()
                for part in ("low", "high"):
                    assert torch.equal(getattr(pages, part), getattr(alone, part))
                wanted, lengths, observed = by_single_operations(choice, alone)
                assert columns.dtype is torch.long and torch.equal(columns, wanted) and counts == lengths
                assert torch.equal(choice.observed, observed)
                assert torch.equal(choose_columns([made()[1]], scaling=0.3)[0][0], columns)


def by_single_operations(choice: ColumnChoice, pages: KeySummaries) -> tuple[Tensor, list[int], Tensor]:
    of, observed = pages.keys_coded, torch.zeros(HEADS, choice.tail, dtype=torch.float32)
    options: dict[str, Any] = {"scaling": 0.3, "observed": observed}
    if choice.threshold is None:
        columns = code_jumps(choice.queries, of, choice.base, choice.tail, choice.most, **options)
        return columns, [columns.shape[1]] * HEADS, observed
    bounds = choice.threshold, choice.least, choice.most
    columns, lengths = code_threshold(choice.queries, of, choice.base, choice.tail, *bounds, **options)
    return columns, lengths.tolist(), observed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_base_outside_the_tail_is_refused(implementation: str) -> None:
    made, _ = session(0, 40, 20, page=16, bits=4, dtype=torch.float32, most=3)
    for column in (-1, 38, 10**9):
        _, choice = made()
        wrong = choice.base.clone()
        wrong[1, 4] = column
        with backend.use(implementation), pytest.raises(ValueError, match="base"):
            choose_columns([made()[1], choice._replace(base=wrong)], scaling=0.3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"most": 40}, "choice 1: 40 more than"),
        ({"least": 5}, "choice 1: at least 5 and at most 3"),
        ({"first": 9}, "from page 9 on"),
        ({"keys": torch.zeros(2, 39, DIM)}, "do not fit codes of 40 columns"),
        ({"queries": torch.zeros(5, 1, DIM)}, "choice 1: queries"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    made, _ = session(0, 40, 20, page=16, bits=4, dtype=torch.float32, most=3)
    with pytest.raises(ValueError, match=said):
        choose_columns([made()[1], made()[1]._replace(**wrong)], scaling=0.3)


def test_a_choice_that_was_never_made_leaves_its_pages_to_be_summarised() -> None:
    made, keys = session(3, 70, 30, page=16, bits=4, dtype=torch.float32, most=3)
    pages, _ = made()  # prepared, and given up: a pass that failed
    longer = torch.cat([keys, keys[:, :5]], dim=1)
    pages.update(longer)
    alone = KeySummaries(16, 4)
    alone.update(longer)
    assert torch.equal(pages.low, alone.low) and torch.equal(pages.codes[:, :4], alone.codes[:, :4])


def test_choices_of_layers_of_other_shapes_are_refused() -> None:
    made, _ = session(0, 40, 20, page=16, bits=4, dtype=torch.float32, most=3)
    _, choice = made()
    with pytest.raises(ValueError, match="choice 1 has queries"):
        choose_columns([choice, made()[1]._replace(queries=torch.zeros(64, 1, DIM))], scaling=0.3)


def test_codes_that_a_choice_has_yet_to_write_cannot_be_read() -> None:
    made, _ = session(3, 70, 30, page=16, bits=4, dtype=torch.float32, most=3)
    pages, choice = made()
    with pytest.raises(PolicyError, match=r"before inputs\.request_selection"):
        pages.logits(choice.queries, 0.3)
