"""Define benchmark cases of operations: the timed call, its check, and the fields of its row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from loopserve.api import load_stack
from loopserve.bench.heads import Heads
from loopserve.bench.rows import Row
from loopserve.bench.speed.parity import Verdict
from loopserve.core.engine.stats import TurnStats
from loopserve.core.policy.interfaces import AttentionInputs, LayerSpec, LayerType, Phase
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern, LinePattern
from loopserve.policies.prefill.loopserve import LoopServePrefill

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Candidate:
    """Hold one operation on one case's tensors.

    run: the timed call. check: verifies the result of ``run``. pattern: densities computed from the result. parts:
    operations whose implementations the row names. scale: factor from measured to reported time.
    """

    op: str
    dtype: torch.dtype
    run: Callable[[], Any]
    check: Callable[[Any], Verdict]
    parts: tuple[str, ...]
    pattern: Callable[[Any], Row | None] = lambda _: None
    scale: float = 1.0
    impl: str | None = None  # None = ask the backend
    lines: tuple[Heads, LinePattern] | None = None  # the attended pairs, so that a rival attends to the same ones
    fields: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Hold one set of tensors, its candidates, and the dense attention that all are compared with.

    dense: the block that baselines compute, float32, on the heads they are run on; ``dense_scale`` scales its time to
    all heads. own_dense: our dense attention on it, by dtype.
    """

    shape: Row
    data: str
    candidates: list[Candidate]
    dense: Heads
    dense_scale: float
    own_dense: dict[torch.dtype, Candidate]
    fields: Row


class Target(Protocol):
    """Define a kind of device: its clock, and torch's dense attention on it."""

    device: str

    def clock(self, run: Callable[[], object]) -> float:
        """Return seconds of one call."""

    def dense(self, heads: Heads, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], object]]:
        """Return by name every way of torch to compute the block densely."""

    def rivals(self, case: Case) -> list[Candidate]:
        """Return other libraries' operations for the same patterns, timed beside ours."""


def described(pattern: AttentionPattern) -> Row:
    """Return densities and line counts of a pattern, means over heads, and the density of the densest head."""
    cells, tiles = pattern.cell_density(), pattern.tile_density()
    fields: Row = {
        "cell_density": float(cells.mean()),
        "tile_density": float(tiles.mean()),
        "tile_density_most": float(tiles.max()),
    }
    if isinstance(pattern, LinePattern):
        fields["verticals_per_head"] = float(pattern.verticals.sum(1).float().mean())
        fields["slashes_per_head"] = float(pattern.slashes.sum(1).float().mean())
        assert pattern.dense_heads is not None
        fields["dense_heads"] = int(pattern.dense_heads.sum())
    if isinstance(pattern, BlockPattern):
        fields["tile"] = pattern.tile
    return fields


def as_call(heads: Heads) -> AttentionInputs:
    """Return one layer's prefill call with these heads, as the engine passes it to a sparsifier."""
    query_heads, new, dim = heads.queries.shape
    kv_heads, total = heads.keys.shape[:2]
    device = heads.keys.device
    return AttentionInputs(
        queries=heads.queries,
        keys=heads.keys,
        values=heads.values,
        columns=torch.arange(total - new, total, device=device),
        positions=torch.arange(total, device=device),
        first_valid=None,
        layer=LayerSpec(0, LayerType.FULL, query_heads, kv_heads, dim),
        phase=Phase.PREFILL,
        turn=0,
        turn_start=total - new,
        output_index=0,
        final=True,
        scaling=heads.scaling,
        softcap=None,
        record=TurnStats(0),
    )


def preset_sparsifier(alpha: float) -> LoopServePrefill:
    """Return the sparsifier of the preset ``loopserve`` with another alpha and without a lower length limit."""
    preset = load_stack("loopserve").prefill
    assert isinstance(preset, LoopServePrefill)
    changed = {"alpha": alpha, "min_new_tokens": 0, "min_total_tokens": 0}
    return LoopServePrefill(preset.config.model_copy(update=changed))
