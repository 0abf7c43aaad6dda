"""What a benchmark of operations compares: one thing to run, how to tell that it is right, and what its row says of it."""

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
    """One operation on one case's tensors.

    run: the timed call. check: judges what ``run`` gave. pattern: densities of what it computed, from what it gave.
    parts: the operations whose implementations the row names. scale: what a measured time counts.
    """

    op: str
    dtype: torch.dtype
    run: Callable[[], Any]
    check: Callable[[Any], Verdict]
    parts: tuple[str, ...]
    pattern: Callable[[Any], Row | None] = lambda _: None
    scale: float = 1.0
    impl: str | None = None  # None = ask the backend
    lines: tuple[Heads, LinePattern] | None = None  # what is attended to, for a rival to do the same
    fields: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One set of tensors: who competes on it, and the dense attention that all are compared with.

    dense: the block that baselines compute, float32, on as many heads as they are run on; ``dense_scale`` makes its time
    that of all heads. own_dense: our dense attention on it, by dtype.
    """

    shape: Row
    data: str
    candidates: list[Candidate]
    dense: Heads
    dense_scale: float
    own_dense: dict[torch.dtype, Candidate]
    fields: Row


class Target(Protocol):
    """A kind of device: its clock, and the dense attention that torch offers there."""

    device: str

    def clock(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""

    def dense(self, heads: Heads, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], object]]:
        """Every way torch has to compute the block densely, by name."""

    def rivals(self, case: Case) -> list[Candidate]:
        """What others offer for the same patterns, measured beside our own."""


def described(pattern: AttentionPattern) -> Row:
    """Densities and lines of a pattern, means over heads, and the densest head."""
    cells, tiles = pattern.cell_density(), pattern.tile_density()
    said: Row = {
        "cell_density": float(cells.mean()),
        "tile_density": float(tiles.mean()),
        "tile_density_most": float(tiles.max()),
    }
    if isinstance(pattern, LinePattern):
        said["verticals_per_head"] = float(pattern.verticals.sum(1).float().mean())
        said["slashes_per_head"] = float(pattern.slashes.sum(1).float().mean())
        assert pattern.dense_heads is not None
        said["dense_heads"] = int(pattern.dense_heads.sum())
    if isinstance(pattern, BlockPattern):
        said["tile"] = pattern.tile
    return said


def as_call(heads: Heads) -> AttentionInputs:
    """One layer's prefill call with these heads, as the engine would hand it to a sparsifier."""
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
    """The preset ``loopserve`` with another alpha, and no shape too short for it."""
    preset = load_stack("loopserve").prefill
    assert isinstance(preset, LoopServePrefill)
    changed = {"alpha": alpha, "min_new_tokens": 0, "min_total_tokens": 0}
    return LoopServePrefill(preset.config.model_copy(update=changed))
