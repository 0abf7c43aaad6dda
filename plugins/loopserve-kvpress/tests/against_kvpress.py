"""The adapter against kvpress itself; ``make oracle`` runs this in the environment that has kvpress.

Each press scores a layer of a small random model twice: with the model's own module and hidden states, and through the
adapter, which knows queries, keys and values only. Prints the largest difference of each, or why it cannot be served; the exit
status is 1 if a press that should be served differs by more than 1e-5.
"""

from __future__ import annotations

import sys
from typing import Any

import kvpress
import torch
from loopserve_kvpress import KVPressDecode

from loopserve.core.errors import LoopServeError
from loopserve.core.interfaces import AttentionInputs, LayerSpec, LayerType, Phase
from loopserve.testing.parts import PlainParts
from loopserve.testing.records import FakeRecord
from tests.oracle.make_fixtures import LAYER, MODELS, SEED, capture, queries_of, tiny

BUDGET = 40
SERVED: dict[str, dict[str, Any]] = {
    "KnormPress": {"reads_queries": False},
    "KeyDiffPress": {"reads_queries": False},
    "LagKVPress": {"reads_queries": False, "options": {"lag_size": 16}},
    "CURPress": {"reads_queries": False},
    "StreamingLLMPress": {"reads_queries": False},
    "SnapKVPress": {"options": {"window_size": 16}},
    "TOVAPress": {},
    "ExpectedAttentionPress": {},
    "ObservedAttentionPress": {"reads_queries": False, "attentions": True},
}
REFUSED = (
    "LeverageScorePress",
    "NonCausalAttnPress",
    "CompactorPress",
    "KVzapPress",
    "QFilterPress",
    "CriticalKVPress",
)


def inputs_of(found: dict[str, Any], heads: int, kv_heads: int, dim: int, tokens: int) -> AttentionInputs:
    layer = LayerSpec(LAYER, LayerType.FULL, heads, kv_heads, dim, parts=PlainParts(heads, dim))
    columns = torch.arange(tokens)
    return AttentionInputs(
        queries_of(found, heads, dim)[0],
        found["keys"][0],
        found["values"][0],
        columns,
        columns,
        None,
        layer,
        Phase.PREFILL,
        turn=0,
        turn_start=0,
        output_index=0,
        final=True,
        scaling=dim**-0.5,
        softcap=None,
        record=FakeRecord(),
    )


def difference(press: str, fields: dict[str, Any], shape: dict[str, int]) -> float:
    """Between the adapter's scores and the press's own on the model's module."""
    heads, kv_heads, dim, tokens = (shape[name] for name in ("heads", "kv_heads", "dim", "tokens"))
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(SEED))
    found = capture(tiny(heads, kv_heads, dim, "eager" if fields.get("attentions") else "sdpa"), ids)
    made = getattr(kvpress, press)(compression_ratio=1 - (BUDGET + 0.5) / tokens, **fields.get("options", {}))
    theirs = made.score(
        found["module"],
        found["hidden"],
        found["keys"].clone(),
        found["values"].clone(),
        found["attention"],
        found["options"],
    )
    policy = KVPressDecode(KVPressDecode.Config(press=press, budget=BUDGET, sink_tokens=0, recent_window=0, **fields))
    return float((policy.score(inputs_of(found, heads, kv_heads, dim, tokens)) - theirs[0]).abs().max())


def refusal(press: str) -> str:
    try:
        difference(press, {}, MODELS["grouped"])
    except (LoopServeError, ValueError, TypeError) as reason:
        return " ".join(str(reason).split())[:160]
    return "served"


def main() -> int:
    wrong = 0
    with torch.no_grad():
        for press, fields in SERVED.items():
            for name, shape in MODELS.items():
                gap = difference(press, fields, shape)
                wrong += gap > 1e-5
                print(f"{press:24} {name:8} {gap:8.1e}  {'equal' if gap <= 1e-5 else 'DIFFERS'}")
        for press in REFUSED:
            print(f"{press:24} {refusal(press) if hasattr(kvpress, press) else 'is not in this kvpress'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
