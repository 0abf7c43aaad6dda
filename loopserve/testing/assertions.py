"""Assert the contract that every policy has with its callers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import AttentionPattern


def assert_selection(selection: KVSelection, inputs: AttentionInputs, budget: int) -> None:
    """Assert that positions are sorted, unique, below the boundary and held by each head, and that ``budget`` is met exactly.

    A head that holds fewer pairs than the budget must select all of them.
    """
    heads = inputs.keys.shape[0]
    selection.check(heads, int(inputs.head_positions(0)[-1]) + 1)
    for head in range(heads):
        held = inputs.head_positions(head)
        held = held[(held >= 0) & (held < selection.boundary)]
        kept = selection.head(head)
        assert len(kept) == min(budget, len(held)), f"head {head}: {len(kept)} kept of {len(held)}, budget {budget}"
        missing = kept[~torch.isin(kept, held)]
        assert len(missing) == 0, f"head {head}: positions {missing.tolist()} are not stored"


def assert_pattern(pattern: AttentionPattern, inputs: AttentionInputs) -> None:
    """Assert that a pattern is causal and that every query attends to itself."""
    mask = pattern.to_mask()
    heads, rows, total = inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens
    assert mask.shape == (heads, rows, total), f"the mask is {list(mask.shape)}"
    columns = torch.arange(total, device="cpu")
    assert not (mask & (columns > inputs.columns[:, None])).any(), "a query attends to a later key"
    assert mask[:, torch.arange(rows, device="cpu"), inputs.columns].all(), "a query does not attend to itself"


@contextmanager
def unchanged(inputs: AttentionInputs) -> Iterator[None]:
    """Assert that no tensor of the inputs is written in this block."""
    tensors: dict[str, Tensor] = {
        name: getattr(inputs, name) for name in ("queries", "keys", "values", "columns", "positions")
    }
    versions = {name: tensor._version for name, tensor in tensors.items()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        assert tensor._version == versions[name] and torch.equal(tensor, copies[name]), f"{name} was written to"
