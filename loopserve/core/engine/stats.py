"""Count what one turn cost and saved. The engine and the policies report the figures; this module only adds them up."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loopserve.core.policy.interfaces import Phase
from loopserve.core.policy.patterns import AttentionPattern


@dataclass
class Mean:
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total += value * weight
        self.weight += weight

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


@dataclass
class TurnStats:
    """Hold the figures of one turn. Implements ``interfaces.Record``.

    Bytes are of keys, values and key summaries read from the cache. The bytes that decode steps read are summed over all reasons
    (attended pairs, re-scoring, summaries). Copying a selection together is not counted, since a kernel that takes indices needs no
    copy. The bytes of keys that a compressor reads before the first output (observation windows, hops) are counted separately, as
    observation.
    """

    turn: int
    prompt_tokens: int = 0  # tokens this turn added
    reused_tokens: int = 0  # tokens of the conversation before this turn; all but the last one are in the cache
    output_tokens: int = 0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0
    compressed_steps: int = 0  # steps in which at least one layer attended to a selection
    reselected_steps: int = 0  # steps in or after which at least one layer got another selection
    store_bytes: int = 0  # held by the store at the end of the turn; until then, at its first output token
    active_bytes: int = 0  # held by active sets and policy states, at the same moments
    phase: Phase = Phase.PREFILL
    measuring_s: float = 0.0  # time spent on figures that the caller requested, not part of ttft_ms
    counters: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    means: dict[str, Mean] = field(default_factory=lambda: defaultdict(Mean))
    bytes_read: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    observation_bytes: float = 0.0  # read by compressors before the first output
    per_head: dict[int, dict[str, list[Mean]]] = field(default_factory=dict)  # by layer, then figure: one mean per head
    dense_bytes: float = 0.0  # bytes that dense attention would have read in the same decode steps

    def count(self, name: str, amount: float = 1.0) -> None:
        self.counters[name] += amount

    def mean(self, name: str, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            self.means[name].add(float(value.double().mean()), value.numel())
        else:
            self.means[name].add(value)

    def head_figures(self) -> dict[int, dict[str, list[float | None]]]:
        """Return the value of each head, by layer and figure (lines, densities, coverages, ...)."""
        return {
            layer: {name: [mean.value for mean in means] for name, means in figures.items()}
            for layer, figures in self.per_head.items()
        }

    def heads(self, layer: int, name: str, values: Tensor) -> None:
        """Add one value per head ``[H]`` to a figure of a layer."""
        figures = self.per_head.setdefault(layer, {})
        if name not in figures:
            figures[name] = [Mean() for _ in range(len(values))]
        for mean, value in zip(figures[name], values.tolist(), strict=True):
            mean.add(value)

    def read(self, kind: str, amount: float) -> None:
        if self.phase is Phase.DECODE:
            self.bytes_read[kind] += amount
        elif kind != "lines":  # what a sparsifier reads is counted as part of the prefill
            self.observation_bytes += amount

    def pattern(self, layer: int, pattern: AttentionPattern, causal_pairs: int) -> None:
        """Add the densities of one layer's prefill call. Calls are weighted by the pairs that dense attention would compute."""
        cells, tiles = pattern.cell_density(), pattern.tile_density()
        self.heads(layer, "prefill_cell_density", cells)
        self.heads(layer, "prefill_tile_density", tiles)
        self.means["prefill_cell_density"].add(float(cells.mean()), causal_pairs * cells.numel())
        self.means["prefill_tile_density"].add(float(tiles.mean()), causal_pairs * tiles.numel())

    def attended(self, pairs: int, dense: int, bytes_per_pair: int) -> None:
        """Add one layer of one decode step: pairs attended, and pairs that dense attention without eviction would attend.

        Both are summed over the KV heads.
        """
        self.means["attended_fraction"].add(pairs / dense, dense)
        self.means["attended_pairs"].add(pairs)
        self.read("attended", pairs * bytes_per_pair)
        self.dense_bytes += dense * bytes_per_pair

    def merge(self, other: TurnStats) -> None:
        """Add the figures of another turn. Sums add up; means are weighted by their counts."""
        for name in (
            "prompt_tokens",
            "reused_tokens",
            "output_tokens",
            "decode_ms",
            "decode_steps",
            "compressed_steps",
            "reselected_steps",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.store_bytes = max(self.store_bytes, other.store_bytes)
        self.active_bytes = max(self.active_bytes, other.active_bytes)
        self.dense_bytes += other.dense_bytes
        self.observation_bytes += other.observation_bytes
        for name, mean in other.means.items():
            self.means[name].total += mean.total
            self.means[name].weight += mean.weight
        for mine, theirs in ((self.counters, other.counters), (self.bytes_read, other.bytes_read)):
            for name, amount in theirs.items():
                mine[name] += amount

    @property
    def tpot_ms(self) -> float | None:
        """Return the milliseconds per output token after the first."""
        return self.decode_ms / self.decode_steps if self.decode_steps else None

    @property
    def kv_bytes_per_token(self) -> float | None:
        return sum(self.bytes_read.values()) / self.decode_steps if self.decode_steps else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values; None where a turn has none (no decode step, no sparse layer)."""
        names = (
            "prefill_cell_density",
            "prefill_tile_density",
            "attended_fraction",
            "attended_pairs",
            "coverage_estimated",
            "coverage_held_out",
            "coverage_realised",
        )
        steps = self.decode_steps
        fixed = {name: self.means[name].value if name in self.means else None for name in names}
        return {
            "turn": self.turn,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "output_tokens": self.output_tokens,
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            **fixed,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_bytes_per_token_with_observation": (
                (sum(self.bytes_read.values()) + self.observation_bytes) / steps if steps else None
            ),
            "dense_kv_bytes_per_token": self.dense_bytes / steps if steps else None,
            "kv_bytes_by_kind": {kind: total / steps for kind, total in self.bytes_read.items()} if steps else {},
            "compressed_share": self.compressed_steps / steps if steps else None,
            "reselected_steps": self.reselected_steps,
            "store_bytes": self.store_bytes,
            "active_bytes": self.active_bytes,
            "fallbacks": sum(count for name, count in self.counters.items() if name.startswith("fallback")),
            "faults": sum(count for name, count in self.counters.items() if name.startswith("fault:")),
            "counters": dict(self.counters),
            "means": {name: mean.value for name, mean in self.means.items() if name not in names},
        }


@dataclass(frozen=True)
class LayerRecord:
    """Take the figures that a policy reports in one layer's call. All go to the turn; figures per head go to the layer as well."""

    stats: TurnStats
    layer: int

    def count(self, name: str, amount: float = 1.0) -> None:
        self.stats.count(name, amount)

    def mean(self, name: str, value: float | Tensor) -> None:
        self.stats.mean(name, value)
        if isinstance(value, Tensor) and value.dim() == 1:
            self.stats.heads(self.layer, name, value)

    def read(self, kind: str, amount: float) -> None:
        self.stats.read(kind, amount)
