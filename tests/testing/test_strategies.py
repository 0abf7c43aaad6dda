"""The public strategies give what the contracts allow, and all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st

from loopserve.core.kv.layer_cache import LayerCache
from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern, DensePattern, LinePattern, RowGroups
from loopserve.kernels.masked import masked_attention
from loopserve.testing import assert_pattern, attention_inputs, patterns, selections


@given(st.data(), attention_inputs(max_tokens=60))
def test_patterns_fit_the_call_they_are_for(data: st.DataObject, inputs: AttentionInputs) -> None:
    size = len(inputs.queries), inputs.new_tokens, inputs.total_tokens
    pattern = data.draw(patterns(size=size))
    assert pattern.size == size
    assert_pattern(pattern, inputs)
    tensors = inputs.queries, inputs.keys, inputs.values
    output, _ = pattern.attend(*tensors, scaling=inputs.scaling, first_valid=inputs.first_valid)
    mask = pattern.to_mask()
    if inputs.first_valid is not None:
        mask = mask & inputs.holds.repeat_interleave(inputs.group, 0)[:, None]
    wanted, _ = masked_attention(*tensors, mask, scaling=inputs.scaling, softcap=None)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-4)


@given(st.data(), st.integers(1, 60), st.integers(1, 3))
def test_selections_are_taken_by_a_cache(data: st.DataObject, length: int, heads: int) -> None:
    selection = data.draw(selections(kv_heads=heads, length=length))
    selection.check(heads, length)
    layer = LayerCache()
    layer.append(*(torch.arange(length).float().view(1, -1, 1).repeat(heads, 1, 2) for _ in range(2)))
    layer.select(selection)
    assert layer.active is not None and layer.active.selection is selection


@pytest.mark.parametrize(
    "wanted",
    [
        lambda pattern: isinstance(pattern, DensePattern),
        lambda pattern: isinstance(pattern, LinePattern) and bool((pattern.cell_density() < 0.5).all()),
        lambda pattern: isinstance(pattern, LinePattern) and bool((pattern.cell_density() == 1).any()),
        lambda pattern: isinstance(pattern, BlockPattern) and pattern.tile < 64 and pattern.total_tokens > 64,
        lambda pattern: isinstance(pattern, RowGroups) and not isinstance(pattern.parts[0], DensePattern),
    ],
)
def test_every_form_of_pattern_is_drawn(wanted: Callable[[AttentionPattern], bool]) -> None:
    assert find(patterns(), wanted)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda selection: selection.ragged and 0 in selection.lengths.tolist(),
        lambda selection: not selection.ragged and selection.indices.shape[1] > 3,
        lambda selection: selection.indices.shape[1] == 0,
        lambda selection: selection.indices.numel() > 0 and selection.boundary > int(selection.indices.max()) + 1 > 1,
    ],
)
def test_every_form_of_selection_is_drawn(wanted: Callable[[KVSelection], bool]) -> None:
    assert find(selections(), wanted)
