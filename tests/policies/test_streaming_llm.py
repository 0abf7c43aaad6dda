"""StreamingLLM: sinks and a window that rolls, the budget exact at every step."""

from __future__ import annotations

import pytest
import torch

from loopserve.core.kv.selection import Retention
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.decode.streaming_llm import StreamingLLMDecode
from loopserve.testing.scripted import ScriptedConversation

KEYS = torch.randn(2, 2, 200, 8, generator=torch.Generator().manual_seed(0))


def conversation(budget: int, sinks: int, retention: Retention) -> ScriptedConversation:
    config = StreamingLLMDecode.Config(budget=budget, sink_tokens=sinks, retention=retention)
    return ScriptedConversation(StreamingLLMDecode(config), KEYS.repeat_interleave(2, dim=1), KEYS)


def attended(talk: ScriptedConversation) -> list[int]:
    """Positions that the next token will attend to, itself left out."""
    layer = talk.cache.layers[0]
    if layer.active is not None:
        chosen = layer.active.selection
        return [*chosen.head(0).tolist(), *range(chosen.boundary, talk.cache.seen)]
    positions = layer.positions()
    return (positions if positions.dim() == 1 else positions[0]).tolist()


@pytest.mark.parametrize("retention", list(Retention))
@pytest.mark.parametrize(("budget", "sinks"), [(12, 4), (5, 4), (8, 0), (1, 0)])
def test_each_step_attends_to_exactly_sinks_and_window(budget: int, sinks: int, retention: Retention) -> None:
    talk = conversation(budget, sinks, retention)
    for tokens in (6, 30):
        talk.prefill(tokens)
        for _ in range(12):
            now = talk.cache.seen  # the position of the next token
            expected = sorted({*range(min(sinks, now)), *range(max(0, now - (budget - sinks) + 1), now)})
            assert attended(talk) == expected
            assert len(expected) + 1 == min(budget, now + 1)
            talk.decode()


def test_keeping_lets_a_new_turn_see_everything_and_evicting_does_not() -> None:
    kept, evicted = (conversation(12, 4, retention) for retention in (Retention.KEEP, Retention.EVICT))
    for talk in (kept, evicted):
        talk.prefill(50)
        talk.decode(3)
    assert kept.cache.layers[0].stored == 53
    assert evicted.cache.layers[0].stored == 11


def test_full_never_selects() -> None:
    talk = ScriptedConversation(FullDecode(), KEYS, KEYS)
    talk.prefill(40)
    talk.decode(3)
    assert talk.active() is None and not talk.selections
