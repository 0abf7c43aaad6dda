"""A pattern made of patterns of consecutive rows."""

from __future__ import annotations

import pytest
import torch

from loopserve.core.policy.patterns import BlockPattern, DensePattern, LinePattern, RowGroups
from loopserve.testing.inputs import make_inputs


def groups() -> RowGroups:
    """Seven rows along lines, six in blocks, four whole; 13 columns of history, two heads."""
    source = torch.Generator().manual_seed(0)
    verticals, slashes = torch.rand(2, 2, 20, generator=source) < 0.2
    blocks = torch.rand(2, 2, 7, generator=source) < 0.3
    return RowGroups((LinePattern(verticals, slashes, 7), BlockPattern(blocks, 6, 26, 4), DensePattern(2, 4, 30)))


def test_its_mask_is_that_of_each_group() -> None:
    whole = groups()
    mask = whole.to_mask()
    assert whole.size == (2, 17, 30) and mask.shape == (2, 17, 30)
    for part, rows in zip(whole.parts, (slice(0, 7), slice(7, 13), slice(13, 17)), strict=True):
        _, _, seen = part.size
        assert torch.equal(mask[:, rows, :seen], part.to_mask()) and not mask[:, rows, seen:].any()
    picked = torch.tensor([14, 19, 20, 29])
    assert torch.equal(whole.rows(picked), mask[:, picked - 13])


def test_it_attends_as_its_mask_says() -> None:
    inputs = make_inputs(new_tokens=17, total_tokens=30, kv_heads=1, group=2)
    whole = groups()
    output, lse = whole.attend(inputs.queries, inputs.keys, inputs.values, scaling=0.25, need_lse=True)
    logits = (inputs.queries @ inputs.keys.transpose(1, 2) * 0.25).masked_fill(~whole.to_mask(), float("-inf"))
    assert torch.allclose(output, logits.softmax(-1) @ inputs.values, atol=1e-5)
    assert lse is not None and torch.allclose(lse, logits.logsumexp(-1), atol=1e-5)
    assert whole.attend(inputs.queries, inputs.keys, inputs.values, scaling=0.25)[1] is None


def test_its_density_counts_every_cell_once() -> None:
    whole = groups()
    assert torch.allclose(whole.cell_density(), whole.to_mask().sum((1, 2)) / whole.causal_pairs)
    assert ((whole.tile_density() > 0) & (whole.tile_density() <= 1)).all()


@pytest.mark.parametrize(
    "parts", [(), (DensePattern(2, 4, 10), DensePattern(2, 4, 15)), (DensePattern(2, 4, 10), DensePattern(1, 4, 14))]
)
def test_groups_that_do_not_follow_on_each_other_are_refused(parts: tuple[DensePattern, ...]) -> None:
    with pytest.raises(ValueError, match="RowGroups"):
        RowGroups(parts)
