"""Compare the pattern with its definition, cell by cell, and both kernels with a plain mask."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from loopserve_star import StarPattern, StarPrefill
from loopserve_star.attention import in_blocks
from torch import Tensor

from loopserve.kernels.masked import masked_attention
from loopserve.testing import parametrize_with_policy_checks
from loopserve.testing.inputs import make_inputs

steady = settings(deadline=None, derandomize=True)
FILLED = (
    StarPattern(4, 30, 130, block=64, anchor=20),
    79,
    True,
    None,
)  # 80 columns of filler: the anchor, and part of the block
SMALL = StarPrefill(StarPrefill.Config(block_size=8, anchor_size=4, last_rows=5))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@st.composite
def patterns(draw: st.DrawFn, most: int = 150) -> StarPattern:
    total = draw(st.integers(1, most))
    new = draw(st.integers(1, total))
    block = draw(st.sampled_from([1, 3, 16, 64, 100]))
    return StarPattern(4, new, total, block, draw(st.sampled_from([0, 1, 20, 64])), draw(st.sampled_from([0, 1, 30])))


def cells(pattern: StarPattern) -> Tensor:
    """Return the cells by definition, one at a time."""
    _, new, total = pattern.size
    mask = torch.zeros(new, total, dtype=torch.bool)
    for row in range(new):
        own = total - new + row
        for key in range(own + 1):
            same_block = key // pattern.block == own // pattern.block
            mask[row, key] = same_block or key < pattern.anchor or own >= total - pattern.whole
    return mask.expand(4, -1, -1)


@steady
@given(patterns(most=70))
def test_the_mask_is_the_definition_and_density_counts_it(pattern: StarPattern) -> None:
    mask = cells(pattern)
    assert torch.equal(pattern.to_mask(), mask)
    assert torch.allclose(pattern.cell_density(), mask.float().sum((1, 2)) / pattern.causal_pairs)
    assert bool(((pattern.tile_density() > 0) & (pattern.tile_density() <= 1)).all())


def test_tile_density_counts_tiles_that_are_walked() -> None:
    """Count tiles of two blocks of 128 columns after an anchor of 64: tiles of 64 rows read 1, 2, 1 + 1 and 1 + 2 tiles
    of 1, 2, 3, 4.
    """
    pattern = StarPattern(2, 256, 256, block=128, anchor=64)
    assert pattern.tile_density().tolist() == pytest.approx([8 / 10] * 2)


def call(pattern: StarPattern, seed: int, filler: bool, softcap: float | None) -> tuple[dict[str, Any], Tensor]:
    """Return inputs for a kernel, and the cells of the pattern without filler."""
    source = torch.Generator().manual_seed(seed)
    _, new, total = pattern.size
    shapes = {"queries": (4, new, 24), "keys": (2, total, 24), "values": (2, total, 24)}
    inputs: dict[str, Any] = {name: torch.randn(*shape, generator=source) for name, shape in shapes.items()}
    inputs |= {"scaling": 0.3, "softcap": softcap}
    mask = pattern.to_mask()
    if filler and total > new:
        inputs["first_valid"] = torch.tensor([0, 1 + seed % (total - new)])
        held = torch.arange(total) >= inputs["first_valid"].repeat_interleave(2)[:, None]
        mask = mask & held[:, None]
    return inputs, mask


def assert_attends(compute: Any, pattern: StarPattern, inputs: dict[str, Any], mask: Tensor) -> None:
    options = {name: inputs[name] for name in ("scaling", "softcap")}
    qkv = [inputs[name] for name in ("queries", "keys", "values")]
    output, lse = compute(**inputs, block=pattern.block, anchor=pattern.anchor, whole=pattern.whole)
    expected, expected_lse = masked_attention(*qkv, mask, **options)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-5)


@steady
@example(*FILLED)
@given(patterns(), st.integers(0, 1000), st.booleans(), st.sampled_from([None, 5.0]))
def test_blocks_attend_as_the_mask_says(pattern: StarPattern, seed: int, filler: bool, softcap: float | None) -> None:
    assert_attends(in_blocks, pattern, *call(pattern, seed, filler, softcap))


@pytest.mark.skipif(not INTERPRETED, reason="run by test_the_kernel_under_the_interpreter")
@settings(steady, max_examples=12, phases=[Phase.explicit, Phase.generate])  # no shrinking, which takes minutes
@example(*FILLED)
@given(patterns(), st.integers(0, 1000), st.booleans(), st.sampled_from([None, 5.0]))
def test_tiles_attend_as_the_mask_says(pattern: StarPattern, seed: int, filler: bool, softcap: float | None) -> None:
    from loopserve_star.triton_attention import in_tiles

    assert_attends(in_tiles, pattern, *call(pattern, seed, filler, softcap))


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="there is no Triton, or it is being interpreted")
def test_the_kernel_under_the_interpreter() -> None:
    """Run in a separate process, since the interpreter must be enabled before a kernel is imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        "tiles_attend",
    ]
    done = subprocess.run(
        [*command, str(Path(__file__))],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@parametrize_with_policy_checks([StarPrefill, SMALL])
def test_conformance(policy: Any, check: Any) -> None:
    check(policy)


def test_a_chunk_that_is_not_the_last_has_no_query_rows() -> None:
    from dataclasses import replace

    inputs = make_inputs(new_tokens=24, total_tokens=24)
    assert not torch.equal(SMALL.sparsify(inputs).to_mask(), SMALL.sparsify(replace(inputs, final=False)).to_mask())


@pytest.mark.parametrize("sizes", [{"block": 0, "anchor": 1}, {"block": 8, "anchor": -1}])
def test_sizes_that_make_no_pattern_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is no pattern"):
        StarPattern(4, 8, 8, **sizes)
