"""One rule says where a layer is decoded dense: a compressor is not called for layers that hold at most so many pairs."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import loopserve
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Phase, Step
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.models.tiny import tiny_model
from loopserve.policies.prefill.dense import DensePrefill
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.conversations import model, prompts

BOUND = 30
Seen = list[tuple[str, str, int]]


class Watching(DecodeCompressor[Seen]):
    """Writes down each call: its method, its phase, and the pairs that were stored."""

    name: ClassVar[str] = "watching"
    paper: ClassVar[str] = ""

    @property
    def dense_below_tokens(self) -> int:
        return BOUND

    def init_state(self) -> Seen:
        return []

    def before_attention(self, inputs: AttentionInputs, state: Seen) -> None:
        state.append(("before", inputs.phase.value, inputs.total_tokens))

    def after_attention(self, inputs: AttentionInputs, state: Seen) -> None:
        state.append(("after", inputs.phase.value, inputs.total_tokens))

    def after_forward(self, step: Step, state: Seen) -> Observation | None:
        state.append(("forward", step.phase.value, step.length))
        if step.phase is Phase.PREFILL and step.final:
            return Observation(torch.tensor([step.turn_start]))
        return None


def expected(turns: list[tuple[list[int], int]], layers: int) -> Seen:
    """The calls of a conversation given as (chunks, outputs that are processed) per turn."""
    seen: Seen = []
    stored = 0
    for chunks, outputs in turns:
        passes = [("prefill", chunk) for chunk in chunks]
        passes += [("observe", 0)] + [("decode", 1)] * outputs
        for phase, tokens in passes:
            stored += tokens
            if stored > BOUND:
                before = [("before", phase, stored)] if phase == "decode" else []
                seen += [*before, ("after", phase, stored)] * layers
                seen.append(("forward", phase, stored))
    return seen


TURNS = [([8, 7], 4), ([10], 6), ([2], 3), ([12, 12], 2)]


def test_the_engine_calls_a_compressor_for_longer_layers_only() -> None:
    served = TokenEngine(
        TransformersModel(model("llama")), PolicyStack("w", DensePrefill(), Watching()), chunk_tokens=12
    )
    session = served.session()
    lengths, stored = [], 0
    for (_, outputs), prompt in zip(TURNS, prompts(0, (15, 9, 1, 23)), strict=True):
        waiting = len(session.tokens) + len(prompt) - stored
        pieces = -(-waiting // 12)
        size = -(-waiting // pieces)
        lengths.append(([min(size, waiting - start) for start in range(0, waiting, size)], outputs))
        list(served.generate(session, prompt, lambda logits: int(logits.argmax()), max_new_tokens=outputs + 1))
        stored = session.cache.seen
    assert session.states["decode:0"] == expected(lengths, len(session.slots.by_layer))
    assert any(phase == "observe" for _, phase, _ in session.states["decode:0"])


def test_a_scripted_conversation_makes_the_same_calls() -> None:
    source = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 4, 90, 8, generator=source), torch.randn(2, 2, 90, 8, generator=source)
    talk = ScriptedConversation(Watching(), queries, keys)
    for chunks, outputs in TURNS:
        talk.prefill(sum(chunks), chunks)
        talk.decode(outputs)
    assert talk.state == expected(TURNS, 2)


def test_apply_makes_no_other_calls() -> None:
    plain = tiny_model("llama")
    prompt = torch.tensor([prompts(1, (26,))[0]])
    with loopserve.apply(plain, PolicyStack("w", DensePrefill(), Watching())) as applied:
        plain.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert applied.last_rows is not None
        seen = applied.last_rows.sessions[0].states["decode:0"]
    assert seen == expected([([26], 9)], plain.config.num_hidden_layers)
    assert seen[0] == ("before", "decode", 31)


class EvictingInTheStep(DecodeCompressor[Seen]):
    """Evicts down to ten pairs before a layer's attention, so that the store is short when the pass is over."""

    name: ClassVar[str] = "evicting_in_the_step"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    @property
    def retention(self) -> Retention:
        return Retention.EVICT

    @property
    def dense_below_tokens(self) -> int:
        return BOUND

    def init_state(self) -> Seen:
        return []

    def before_attention(self, inputs: AttentionInputs, state: Seen) -> KVSelection:
        state.append(("before", inputs.phase.value, inputs.total_tokens))
        kept = inputs.head_positions(0)[-10:].expand(inputs.keys.shape[0], -1).contiguous()
        return KVSelection.uniform(kept, inputs.length, Retention.EVICT)

    def after_forward(self, step: Step, state: Seen) -> Any:
        state.append(("forward", step.phase.value, step.length))


@pytest.mark.parametrize("prompt", [29, 40])
def test_after_forward_is_called_though_the_store_has_shrunk_in_the_pass(prompt: int) -> None:
    served = TokenEngine(TransformersModel(model("llama")), PolicyStack("e", DensePrefill(), EvictingInTheStep()))
    session = served.session()
    list(served.generate(session, prompts(2, (prompt,))[0], lambda logits: int(logits.argmax()), max_new_tokens=4))
    layers = len(session.slots.by_layer)
    first = max(prompt + 1, BOUND + 1)
    shown = [("before", "decode", first)] * layers + [("forward", "decode", first)]
    prefill = [("forward", "prefill", prompt)] if prompt > BOUND else []
    assert session.states["decode:0"] == prefill + shown
