"""Hypothesis strategies over attention inputs. Needs hypothesis, which loopserve itself does not."""

from __future__ import annotations

from hypothesis import strategies as st

from loopserve.core.interfaces import AttentionInputs, Phase
from loopserve.testing.inputs import make_inputs


@st.composite
def attention_inputs(
    draw: st.DrawFn,
    *,
    phase: Phase = Phase.PREFILL,
    max_tokens: int = 96,
    min_new_tokens: int = 1,
    evictions: bool = True,
) -> AttentionInputs:
    """Any one call: turn one (no history) or later, groups of 1, 2 and 4, noise or structure, with or without
    evicted pairs.
    """
    total = draw(st.integers(max(2, min_new_tokens), max_tokens), label="total_tokens")
    new = 1 if phase is Phase.DECODE else draw(st.integers(min_new_tokens, total), label="new_tokens")
    history = total - new
    evicted = draw(st.integers(0, 20), label="evicted") if evictions and history else 0
    kv_heads = draw(st.integers(1, 3), label="kv_heads")
    ragged = draw(st.integers(0, history - 1), label="ragged") if evicted and history > 1 and kv_heads > 1 else 0
    return make_inputs(
        new_tokens=new,
        total_tokens=total,
        kv_heads=kv_heads,
        group=draw(st.sampled_from([1, 2, 4]), label="group"),
        head_dim=draw(st.sampled_from([4, 16]), label="head_dim"),
        seed=draw(st.integers(0, 2**16), label="seed"),
        structured=draw(st.booleans(), label="structured"),
        evicted=evicted,
        ragged=ragged,
        phase=phase,
        turn=draw(st.integers(0, 3), label="turn"),
    )
