"""The benchmark's inputs: heads whose attention really lies on lines, and lines of a stated density."""

from __future__ import annotations

import pytest
import torch

from loopserve.bench.heads import planted_lines, random_heads, structured_heads
from loopserve.bench.speed.parity import as_call, lines_sparsifier
from loopserve.core.policy.patterns import LinePattern


def test_structured_heads_lie_on_few_lines_and_random_ones_do_not() -> None:
    densities = {}
    for make in (structured_heads, random_heads):
        pattern = lines_sparsifier(0.95).sparsify(as_call(make(8, 4, 2048, 2048, 64)))
        assert isinstance(pattern, LinePattern)
        densities[make.__name__] = pattern.cell_density()
    structured, flat = densities["structured_heads"], densities["random_heads"]
    assert 0.03 < float(structured.mean()) < 0.3 and float(flat.mean()) > 0.7
    assert float(structured.max()) > 1.3 * float(structured.min())  # heads differ


def test_structured_heads_depend_on_the_seed_only_and_end_alike() -> None:
    whole, again = (structured_heads(4, 2, 96, 96, 32, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, again.tensors, strict=True))
    other = structured_heads(4, 2, 96, 96, 32, seed=4)
    assert not torch.equal(whole.keys, other.keys)
    with pytest.raises(ValueError, match="head_dim"):
        structured_heads(2, 1, 8, 8, 16)


@pytest.mark.parametrize("of", ["cells", "tiles"])
@pytest.mark.parametrize(("new", "total"), [(4096, 4096), (256, 4096)])
def test_planted_lines_have_the_density_that_was_asked_for(of: str, new: int, total: int) -> None:
    pattern = planted_lines(2, new, total, 0.15, of=of)  # type: ignore[arg-type]
    density = pattern.cell_density() if of == "cells" else pattern.tile_density()
    assert 0.09 < float(density.mean()) <= 0.15
    assert not torch.equal(pattern.verticals[0], pattern.verticals[1])
