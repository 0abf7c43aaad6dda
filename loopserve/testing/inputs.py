"""Make a policy's inputs: seeded attention inputs of every form, a layer's rotary positions and output weight, a record."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.interfaces import AttentionInputs, Phase, Record
from loopserve.core.policy.layers import LayerParts, LayerSpec, LayerType, Need

_BASE = 10_000.0


def make_inputs(
    *,
    new_tokens: int = 16,
    total_tokens: int = 48,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    seed: int = 0,
    structured: bool = False,
    evicted: int = 0,
    ragged: int = 0,
    phase: Phase = Phase.PREFILL,
    layer: int = 0,
    turn: int = 0,
    output_index: int = 0,
    final: bool = True,
    selection: KVSelection | None = None,
    record: Record | None = None,
) -> AttentionInputs:
    """Return one attention call: ``new_tokens`` queries at the end of ``total_tokens`` stored columns.

    structured: heads with sinks, a local band and a few strong columns, instead of noise. evicted: number of earlier
    tokens of the history that are gone, different ones in each KV head. ragged: number of pairs that the last KV head
    holds less, behind filler columns.
    """
    source = torch.Generator().manual_seed(seed)
    heads = kv_heads * group
    queries = torch.randn(heads, new_tokens, head_dim, generator=source, dtype=torch.float32, device="cpu")
    keys = torch.randn(kv_heads, total_tokens, head_dim, generator=source, dtype=torch.float32, device="cpu")
    values = torch.randn(kv_heads, total_tokens, head_dim, generator=source, dtype=torch.float32, device="cpu")
    if structured:
        queries = queries + _structure(keys, new_tokens, group, source)
    history = total_tokens - new_tokens
    spec = LayerSpec(layer, LayerType.FULL, heads, kv_heads, head_dim, parts=PlainParts(heads, head_dim))
    if ragged and (not evicted or ragged >= history):
        raise ValueError("ragged heads come from an eviction and leave at least one pair of the history")
    return AttentionInputs(
        queries=queries,
        keys=keys,
        values=values,
        columns=torch.arange(history, total_tokens, device="cpu"),
        positions=_positions(history, new_tokens, kv_heads, evicted, ragged, source),
        first_valid=torch.tensor([0] * (kv_heads - 1) + [ragged], dtype=torch.long, device="cpu") if ragged else None,
        layer=spec,
        phase=phase,
        turn=turn,
        turn_start=history + evicted,
        output_index=output_index,
        final=final,
        scaling=head_dim**-0.5,
        softcap=None,
        record=record if record is not None else FakeRecord(),
        selection=selection,
        compressor_layers=(spec,),
    )


def _structure(keys: Tensor, new_tokens: int, group: int, source: torch.Generator) -> Tensor:
    """Return the addition to the queries ``[Hq, Tq, D]`` that makes them attend to the first key, their neighbours and
    a few columns.
    """
    per_query = keys.repeat_interleave(group, dim=0)
    own = per_query[:, -new_tokens:]
    strong = torch.randint(keys.shape[1], (per_query.shape[0], 2), generator=source, device="cpu")
    looked_at = per_query.gather(1, strong[..., None].expand(-1, -1, keys.shape[2])).sum(1, keepdim=True)
    return own + looked_at + per_query[:, :1]


def _positions(
    history: int, new_tokens: int, kv_heads: int, evicted: int, ragged: int, source: torch.Generator
) -> Tensor:
    if not evicted:
        return torch.arange(history + new_tokens, device="cpu")
    rows = []
    tail = torch.arange(history + evicted, history + evicted + new_tokens, device="cpu")
    for head in range(kv_heads):
        filler = ragged if head == kv_heads - 1 else 0
        kept = torch.randperm(history + evicted, generator=source, device="cpu")[: history - filler].sort().values
        rows.append(torch.cat([torch.full((filler,), -1, dtype=torch.long, device="cpu"), kept, tail]))
    return torch.stack(rows)


class PlainParts(LayerParts):
    """Rotate by halves as Llama does; the output weight is drawn from a seed."""

    def __init__(self, query_heads: int, head_dim: int, width: int | None = None, seed: int = 0) -> None:
        """Take the width of the model; that of all heads together by default."""
        source = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(
            query_heads, head_dim, width or query_heads * head_dim, generator=source, dtype=torch.float32, device="cpu"
        )

    def lacks(self, need: Need) -> str | None:
        return None

    def rotate(self, vectors: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        half = vectors.shape[-1] // 2
        speeds = _BASE ** (-torch.arange(half, dtype=torch.float32, device=vectors.device) / half)
        angles = positions.float()[:, None] * speeds * (-1 if back else 1)
        cos, sin = angles.cos(), angles.sin()
        first, second = vectors[..., :half], vectors[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def output_weight(self) -> Tensor:
        return self._weight


class FakeRecord:
    """Keep each value that a policy reports, for a test to read (``interfaces.Record``)."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = defaultdict(float)
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.bytes: dict[str, float] = defaultdict(float)

    def count(self, name: str, amount: float = 1.0) -> None:
        self.counters[name] += amount

    def mean(self, name: str, value: float | Tensor) -> None:
        self.values[name].append(_tensor(value).detach().clone())

    def read(self, kind: str, amount: float) -> None:
        self.bytes[kind] += amount


def _tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
