"""Every kernel in every configuration, compiled for GPUs that are not there: it fits, does not spill much, and
multiplies on matrix units.

Without a GPU this is what can be known about speed. ``calls`` is the one table of what is started; a kernel that no
call starts fails a test.
"""

from __future__ import annotations

import os

import pytest
import torch

from loopserve.kernels.decode_attention import DecodeRequest
from tests.kernels.triton.ahead import SHARED_LIMIT, Launch, compiled, launches_of
from tests.kernels.triton.calls import attention, call, heads, kernels, others, paged, sessions, variants

CAPABILITIES = sorted(SHARED_LIMIT)
MULTIPLYING = {
    "vertical_slash_kernel",
    "block_sparse_kernel",
    "dense_kernel",
    "decode_kernel",
    "decode_batch_kernel",
    "row_sums_kernel",
    "row_masses_kernel",
    "code_logits_kernel",
}
# Bytes of stack per thread. At 128 channels a few pointers, at 256 the sums themselves; float32 keeps its three products.
SPILL = {(torch.bfloat16, 64): 16, (torch.bfloat16, 128): 128, (torch.bfloat16, 256): 128, (torch.float32, 128): 256}


def check(launches: list[Launch], capability: int, spill: int) -> None:
    for each in launches:
        made = compiled(each, capability)
        where = f"{each.name} on sm_{capability}: {made}"
        assert made.shared <= SHARED_LIMIT[capability], where
        assert made.spilled <= spill, where
        assert (made.matrix > 0) == (each.name in MULTIPLYING), where


# One head size for every GPU, the others for one. `make test-compiled` compiles all for all, in about six minutes.
EVERYTHING = os.environ.get("LOOPSERVE_COMPILE") == "all"
CONFIGURATIONS = [
    (dtype, channels, capability)
    for dtype, channels in SPILL
    for capability in CAPABILITIES
    if EVERYTHING or capability == 90 or (channels == 128 and dtype == torch.bfloat16)
]


@pytest.mark.parametrize(("dtype", "channels", "capability"), CONFIGURATIONS)
def test_attention_and_scores(dtype: torch.dtype, channels: int, capability: int) -> None:
    for operation, args, options in attention(dtype, channels):
        check(launches_of(call(operation, args, options), capability), capability, SPILL[dtype, channels])


@pytest.mark.parametrize("capability", CAPABILITIES if EVERYTHING else [90])
def test_variants(capability: int) -> None:
    for operation, args, options in variants(torch.bfloat16, 128):
        check(launches_of(call(operation, args, options), capability), capability, SPILL[torch.bfloat16, 128])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_stores_in_blocks(capability: int) -> None:
    """Rows that a block table finds are copied 16 bytes at once, as those of a store in one piece."""
    kind = torch.bfloat16, 128
    for operation, args, options in paged(*kind):
        launches = launches_of(call(operation, args, options), capability)
        check(launches, capability, SPILL[kind])
        reading = [compiled(each, capability) for each in launches if each.name in MULTIPLYING]
        assert reading and all(each.wide >= 64 and not each.single for each in reading), (operation, reading)


def test_what_changes_the_scores() -> None:
    """Float16, filler columns and a softcap are other kernels; one GPU says enough of them."""
    first_valid = torch.zeros(2, dtype=torch.long)
    for operation, args, options in attention(torch.float16, 64, softcap=30.0, first_valid=first_valid):
        check(launches_of(call(operation, args, options), 90), 90, 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_selection_and_copies(capability: int) -> None:
    for operation, args, options in others():
        check(launches_of(call(operation, args, options), capability), capability, 16)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_at_loaded_places_are_read_as_wide_as_others(capability: int) -> None:
    """The compiler knows nothing of a place that a kernel loads by itself, and would copy number by number."""
    queries, keys, values = heads(torch.bfloat16, 128, 1)
    options = {"scaling": 0.1, "softcap": None}
    chosen = {"columns": torch.zeros(2, 2048, dtype=torch.long), "tail": keys.shape[1] - 32, "first_valid": None}
    alone = launches_of(call("decode_attention", (queries, keys, values), options | chosen), capability)[0]
    batch = (queries, sessions(queries, keys, values, None))
    together = launches_of(call("decode_attention_batch", batch, options), capability)[0]
    assert together.name == "decode_batch_kernel"
    assert compiled(together, capability).copies == compiled(alone, capability).copies > 0
    shifted = [each[..., 1:-1] for each in (queries, keys, values)]
    anywhere = launches_of(
        call("decode_attention_batch", (queries, [DecodeRequest(*shifted)] * 2), options), capability
    )
    assert compiled(anywhere[0], capability).spilled <= 256  # what no store of ours needs
    assert dict(anywhere[0].constants)["ALIGNED"] == 0 and dict(together.constants)["ALIGNED"] == 8


def test_no_kernel_is_forgotten() -> None:
    started = set()
    for operation, args, options in [*attention(torch.bfloat16, 64), *others()]:
        started |= {each.name for each in launches_of(call(operation, args, options), 90)}
    assert started == kernels()
    assert started >= MULTIPLYING
