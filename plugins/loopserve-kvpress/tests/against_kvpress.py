"""Compare the adapter with kvpress; ``make oracle`` runs this in the environment that has kvpress.

Each press scores a layer of a small random model twice: with the model's own module and hidden states, and through the
adapter, which has queries, keys and values only. Prints the largest difference of each, or why it is refused. The exit
status is 1 if a supported press differs by more than 1e-5, or if an unsupported one is not refused.
"""

from __future__ import annotations

import sys
from typing import Any

import kvpress
import torch
from loopserve_kvpress import KVPressDecode

from loopserve import AttentionInputs, LayerSpec, LayerType, LoopServeError, Phase
from loopserve.testing.inputs import FakeRecord, PlainParts
from tests.oracle.make_fixtures import LAYER, MODELS, SEED, capture, queries_of, tiny

BUDGET = 40
SERVED: dict[str, dict[str, Any]] = {
    "KnormPress": {"reads_queries": False},
    "KeyDiffPress": {"reads_queries": False},
    "LagKVPress": {"reads_queries": False, "options": {"lag_size": 16}},
    "CURPress": {"reads_queries": False},
    "StreamingLLMPress": {"reads_queries": False},
    "RandomPress": {"reads_queries": False, "options": {"seed": 3}},
    "SnapKVPress": {"options": {"window_size": 16}},
    "PyramidKVPress": {"options": {"window_size": 16}},
    "TOVAPress": {},
    "ExpectedAttentionPress": {},
    "CapPress": {},
    "NonCausalAttnPress": {},
    "ObservedAttentionPress": {"reads_queries": False, "attentions": True},
}
REFUSED = {
    "CompactorPress",
    "CriticalKVPress",
    "ExpectedAttentionStatsPress",
    "FinchPress",
    "KVzapPress",
    "LeverageScorePress",
    "QFilterPress",
    "ScorerPress",
}


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


def captured(shape: dict[str, int], implementation: str) -> tuple[dict[str, Any], AttentionInputs]:
    """Return the inputs of a press of kvpress at one layer, and those of a policy."""
    heads, kv_heads, dim, tokens = (shape[name] for name in ("heads", "kv_heads", "dim", "tokens"))
    ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(SEED))
    found = capture(tiny(heads, kv_heads, dim, implementation), ids)
    return found, inputs_of(found, heads, kv_heads, dim, tokens)


def adapted(press: str, fields: dict[str, Any]) -> KVPressDecode:
    return KVPressDecode(KVPressDecode.Config(press=press, budget=BUDGET, sink_tokens=0, recent_window=0, **fields))


def difference(press: str, fields: dict[str, Any], shape: dict[str, int]) -> float:
    """Return the largest difference between the adapter's scores and the press's own on the model's module."""
    found, inputs = captured(shape, "eager" if fields.get("attentions") else "sdpa")
    ratio = 1 - (BUDGET + 0.5) / shape["tokens"]
    made = getattr(kvpress, press)(compression_ratio=ratio, **fields.get("options", {}))
    keys, values = found["keys"].clone(), found["values"].clone()
    theirs = made.score(found["module"], found["hidden"], keys, values, found["attention"], found["options"])
    return float((adapted(press, fields).score(inputs) - theirs[0]).abs().max())


def refusal(press: str) -> str | None:
    """Return why the adapter refuses a press, or None."""
    _, inputs = captured(MODELS["grouped"], "sdpa")
    try:
        adapted(press, {}).score(inputs)
    except (LoopServeError, ValueError) as reason:
        return " ".join(str(reason).split())
    return None


def scorers_of_kvpress() -> set[str]:
    found = {name: value for name, value in vars(kvpress).items() if isinstance(value, type)}
    return {name for name, value in found.items() if callable(getattr(value, "score", None))}


def main() -> int:
    wrong = 0
    with torch.no_grad():
        for press, fields in SERVED.items():
            for name, shape in MODELS.items():
                gap = difference(press, fields, shape)
                wrong += gap > 1e-5
                print(f"{press:28} {name:8} {gap:8.1e}  {'equal' if gap <= 1e-5 else 'DIFFERS'}")
        for press in sorted(scorers_of_kvpress() - SERVED.keys()):
            reason = refusal(press)
            known = press in REFUSED and reason is not None
            wrong += not known
            print(f"{press:28} {'refused' if known else 'NOT EXPECTED'}: {reason}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
