"""KVzip against plain loops, and what the engine owes to an observation that reads tokens again behind the conversation."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.errors import InputError, PolicyError
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Phase, Step
from loopserve.core.policy.registry import Kind
from loopserve.core.stack.stack import PolicyStack, resolve_stack
from loopserve.models.bridge import TransformersModel
from loopserve.policies.decode.kvzip import KVzipDecode
from loopserve.policies.prefill.dense import DensePrefill
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.conversations import DENSE, conversation, engine, model, prompts
from tests.policies.small import built, registered

HEADS, GROUP, DIM, LENGTH = 2, 2, 16, 200
SCALE = DIM**-0.5


def script() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(1, HEADS, LENGTH, DIM, generator=source)
    return 2 * torch.randn(1, HEADS * GROUP, LENGTH, DIM, generator=source), keys


def naive_scores(
    talk: ScriptedConversation, head: int, start: int, config: KVzipDecode.Config, sinks: list[int]
) -> dict[int, float]:
    """Scores of the positions from ``start`` on, chunk by chunk, in loops. Position p of the script is the p-th row read again."""
    length, scores = talk.cache.seen, {}
    for first in range(start, length, config.chunk):
        chunk = list(range(first, min(first + config.chunk, length)))
        rows = list(range(length, length + len(config.prompt) + len(chunk)))
        for member in range(head * GROUP, (head + 1) * GROUP):
            for row in rows:
                seen = [*(at for at in sinks if at < first), *chunk, *(other for other in rows if other <= row)]
                query = talk.queries[0, member, row].double()
                powers = [math.exp(float(query @ talk.keys[0, head, at].double()) * SCALE) for at in seen]
                for at, power in zip(seen, powers, strict=True):
                    if at in chunk:
                        scores[at] = max(scores.get(at, 0.0), power / sum(powers))
    return scores


@pytest.mark.parametrize("retention", list(Retention))
@pytest.mark.parametrize("prompt", [(), (3, 1)])
def test_kvzip_keeps_what_reading_again_attends_to_most(prompt: tuple[int, ...], retention: Retention) -> None:
    config = KVzipDecode.Config(budget=16, chunk=12, prompt=prompt, sink_tokens=2, recent_window=3, retention=retention)
    talk = ScriptedConversation(KVzipDecode(config), *script())
    scores: list[dict[int, float]] = [{}, {}]
    alive: list[list[int]] = [[], []]
    scored = 0
    for tokens, outputs in ((10, 2), (26, 4), (1, 3), (20, 2)):
        talk.prefill(tokens)
        length = talk.cache.seen
        for head in range(HEADS):
            fresh = [at for at in range(length) if at not in scores[head] or retention is Retention.KEEP]
            alive[head] = sorted({*alive[head], *(at for at in fresh if at >= scored or retention is Retention.KEEP)})
            if length > 16:
                scores[head] |= naive_scores(talk, head, scored, config, [0, 1])
                forced = [0, 1, *range(length - 3, length)]
                ranked = sorted(alive[head], key=lambda at: (at not in forced, -scores[head][at], at))
                alive[head] = sorted(ranked[:16])
        if length > 16:
            assert [positions[0] for positions in talk.observed][-1] >= scored
            scored = length
            assert held(talk) == alive
        talk.decode(outputs)
    assert [int(each[0]) for each in talk.observed] == [0, 12, 24, 36, 38, 43, 55]
    assert talk.cache.seen == 57 + 11  # what was read again is not stored


def held(talk: ScriptedConversation) -> list[list[int]]:
    cache = talk.cache.layers[0]
    if cache.active is not None:
        return [cache.active.selection.head(head).tolist() for head in range(HEADS)]
    return [row[row >= 0].tolist() for row in cache.positions().expand(HEADS, -1)]


def test_kvzip_reads_nothing_again_within_its_budget() -> None:
    talk = ScriptedConversation(KVzipDecode(KVzipDecode.Config(budget=40)), *script())
    talk.prefill(40)
    assert not talk.observed and talk.active() is None


@pytest.mark.parametrize("outer", ["adakv", "chunkkv", "pyramidkv", "flowkv"])
@pytest.mark.parametrize("retention", list(Retention))
def test_wrappers_wait_until_kvzip_has_read_again(outer: str, retention: Retention) -> None:
    inner = {"policy": "kvzip", "budget": 24, "recent_window": 4, "chunk": 16, "retention": retention.value}
    talk = ScriptedConversation(built(Kind.DECODE, {"policy": outer, "inner": inner}), *script())
    talk.prefill(50)
    assert len(talk.observed) == 4
    assert sum(len(each) for each in held(talk)) == 2 * 24


class Repeating(DecodeCompressor[list[Any]]):
    """Reads its turn again in two passes, and writes down what it is shown."""

    name: ClassVar[str] = "repeating"
    paper: ClassVar[str] = ""
    asked: list[Observation]

    def init_state(self) -> list[Any]:
        return []

    def after_attention(self, inputs: AttentionInputs, state: list[Any]) -> None:
        if inputs.phase is Phase.OBSERVE:
            state.append((inputs.layer.index, inputs.new_tokens, inputs.total_tokens, inputs.columns.tolist()))

    def after_forward(self, step: Step, state: list[Any]) -> Observation | None:
        if step.phase is Phase.DECODE:
            return None
        state.append(("length", step.length))
        passes = sum(each[0] == "length" for each in state) - 1
        return self.asked[passes] if passes < len(self.asked) else None


def repeating(*asked: Observation) -> TokenEngine:
    policy = Repeating()
    policy.asked = list(asked)
    return TokenEngine(TransformersModel(model("llama")), PolicyStack("repeating", DensePrefill(), policy))


def test_tokens_read_again_stand_behind_the_conversation_and_are_dropped() -> None:
    one = Observation(torch.arange(0, 3), again=True, prompt=(9,))
    served = repeating(one, Observation(torch.arange(3, 5), again=True))
    session = served.session()
    plain = TokenEngine(TransformersModel(model("llama")), PolicyStack("plain", DensePrefill(), Plain()))
    beside = plain.session()
    for read, other in ((served, session), (plain, beside)):
        read.prefill(other, prompts(0, (5,))[0], max_new_tokens=4)
    state = next(each for slot, each in session.states.items() if slot.startswith("decode"))
    layers = range(len(session.slots.by_layer))
    assert state == [
        ("length", 5),
        *((layer, 4, 9, [5, 6, 7, 8]) for layer in layers),
        ("length", 5),
        *((layer, 2, 7, [5, 6]) for layer in layers),
        ("length", 5),
    ]
    for mine, theirs in zip(session.cache.layers, beside.cache.layers, strict=True):
        assert mine.seen == theirs.seen == 5 and mine.store is not None and theirs.store is not None
        assert torch.equal(mine.store.keys, theirs.store.keys) and torch.equal(mine.store.values, theirs.store.values)


class Plain(Repeating):
    """Asks for nothing."""

    name: ClassVar[str] = "plain_repeating"
    paper: ClassVar[str] = ""
    asked: ClassVar[list[Observation]] = []  # type: ignore[misc]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([Observation(torch.tensor([2]), again=True), Observation(torch.tensor([2]), again=True)], "must rise within"),
        ([Observation(torch.tensor([2]), again=True), Observation(torch.tensor([3]))], "may not ask for another"),
        ([Observation(torch.tensor([2])), Observation(torch.tensor([3]), again=True)], "may not ask for another"),
        ([Observation(torch.tensor([5]), again=True)], "must rise within"),
        ([Observation(torch.tensor([1]), again=True, prompt=("x",))], "token ids"),  # type: ignore[arg-type]
    ],
)
def test_an_observation_that_would_not_end_or_reads_nothing_known_is_named(asked: list[Observation], says: str) -> None:
    served = repeating(*asked)
    with pytest.raises(PolicyError, match=says):
        served.prefill(served.session(), [3, 4, 5, 6, 7])


def test_a_conversation_that_leaves_no_positions_to_read_again_is_refused_with_the_remedy() -> None:
    served = engine("llama", DENSE, {"policy": "kvzip", "budget": 24, "recent_window": 4})
    limit = served.model.max_positions
    assert limit is not None
    with pytest.raises(InputError, match=r"reads \d+ tokens again .*chunk"):
        served.prefill(served.session(), [5] * (limit - 40), max_new_tokens=4)


def test_a_prompt_of_another_vocabulary_is_refused_with_the_remedy() -> None:
    served = engine("llama", DENSE, {"policy": "kvzip", "budget": 24, "recent_window": 4, "prompt": [99_999]})
    with pytest.raises(InputError, match=r"token 99999 .*prompt"):
        served.prefill(served.session(), [5] * 60, max_new_tokens=4)


def test_the_chunks_that_are_read_again_reach_the_same_choice_with_other_policies_beside() -> None:
    """A selection that another layer's policy has made before is still there after the tokens are dropped."""
    written = {"policy": "kvzip", "budget": 24, "recent_window": 4, "chunk": 16}
    snap = {"policy": "snapkv", "budget": 24, "window": 8}
    layers = [{"at": [0], "decode": snap}]
    stack = resolve_stack({"prefill": DENSE, "decode": written, "layers": layers}, registered())
    served = TokenEngine(TransformersModel(model("llama")), stack)
    session = served.session()
    assert torch.isfinite(conversation(served, session)).all()
    for number, layer in enumerate(session.cache.layers):
        assert layer.active is not None and layer.active.selection.indices.shape[1] == 24, number
        if layer.active.pairs is not None:
            assert layer.active.pairs.length == 24 + session.cache.seen - layer.active.selection.boundary
