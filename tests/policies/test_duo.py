"""DuoAttention: which heads look far back, the same split in both phases, and what heads of each kind attend to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.errors import ConfigError
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import DensePattern
from loopserve.policies.decode.duo import DuoDecode
from loopserve.policies.head_split import best_share, far_mass, read_scores, write_scores
from loopserve.policies.prefill.duo import DuoPrefill
from loopserve.policies.prefill.head_search import HeadSearch
from loopserve.testing.inputs import make_inputs
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.conversations import engine, prompts

SPLIT: dict[str, Any] = {"sink_tokens": 3, "recent_window": 10, "calibration_tokens": 30}


def naive_far_mass(inputs: AttentionInputs, sinks: int, recent: int) -> list[float]:
    """Share of attention outside of sinks and window by cells, over up to 64 rows that see further than both."""
    history = inputs.total_tokens - inputs.new_tokens
    rows = [row for row in range(inputs.new_tokens) if history + row >= sinks + recent]
    count = min(64, len(rows))
    rows = [rows[(step + 1) * len(rows) // count - 1] for step in range(count)]
    found = []
    for kv_head in range(inputs.keys.shape[0]):
        first = 0 if inputs.first_valid is None else int(inputs.first_valid[kv_head])
        far = 0.0
        for head in range(kv_head * inputs.group, (kv_head + 1) * inputs.group):
            for row in rows:
                at = int(inputs.columns[row])
                powers = [
                    math.exp(
                        float(inputs.queries[head, row].double() @ inputs.keys[kv_head, c].double()) * inputs.scaling
                    )
                    for c in range(first, at + 1)
                ]
                outside = [p for c, p in enumerate(powers, first) if c >= first + sinks and at - c >= recent]
                far += sum(outside) / sum(powers) / len(rows) / inputs.group
        found.append(far)
    return found


@pytest.mark.parametrize(
    "call",
    [
        {"new_tokens": 40, "total_tokens": 40},
        {"new_tokens": 90, "total_tokens": 120, "kv_heads": 3},
        {"new_tokens": 30, "total_tokens": 53, "evicted": 9, "ragged": 13, "seed": 5},
    ],
)
def test_far_mass_is_the_attention_outside_of_sinks_and_window(call: dict[str, Any]) -> None:
    inputs = make_inputs(**call)
    found = far_mass(inputs, 3, 10, kind="lines")
    assert found.tolist() == pytest.approx(naive_far_mass(inputs, 3, 10), abs=1e-5)


def test_heads_are_ranked_over_all_layers_and_ties_go_to_the_first() -> None:
    scores = {0: [0.1, 0.5], 1: [0.5, 0.9], 3: [0.0, 0.2]}
    assert best_share(scores, 0.34) == {0: [False, True], 1: [True, True], 3: [False, False]}
    assert best_share(scores, 0.33) == {0: [False, True], 1: [False, True], 3: [False, False]}
    assert all(all(heads) for heads in best_share(scores, 1.0).values())


def far_and_near(seed: int = 0, length: int = 200) -> tuple[Tensor, Tensor]:
    """Two layers: KV head 1 of the first and 0 of the second look at token 20, the others at the token before."""
    source = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 2, length, 32, generator=source)
    queries = 0.1 * torch.randn(2, 4, length, 32, generator=source)
    for layer, kv_head in ((0, 1), (1, 0)):
        near = 1 - kv_head
        queries[layer, 2 * kv_head : 2 * kv_head + 2] += 3 * keys[layer, kv_head, 20]
        queries[layer, 2 * near : 2 * near + 2, 1:] += 3 * keys[layer, near, :-1]
    return queries, keys


def call(queries: Tensor, keys: Tensor, layer: int, start: int, end: int, turn: int, state: Any) -> AttentionInputs:
    made = make_inputs(new_tokens=end - start, total_tokens=end, head_dim=32, layer=layer, turn=turn)
    made.queries.copy_(queries[layer, :, start:end])
    made.keys.copy_(keys[layer, :, :end])
    return AttentionInputs(**{**vars(made), "state": state})


def test_both_phases_find_the_same_heads_and_keep_them() -> None:
    queries, keys = far_and_near()
    prefill, decode = DuoPrefill(DuoPrefill.Config(**SPLIT)), DuoDecode(DuoDecode.Config(**SPLIT))
    state: dict[int, Tensor] = {}
    talk = ScriptedConversation(decode, queries, keys)
    for turn, (start, end) in enumerate(((0, 20), (20, 80), (80, 120))):
        patterns = [prefill.sparsify(call(queries, keys, layer, start, end, turn, state)) for layer in (0, 1)]
        talk.prefill(end - start)
        if turn == 0:  # too short to tell
            assert all(isinstance(each, DensePattern) for each in patterns)
            assert not state and not talk.state.retrieval
            continue
        assert {layer: heads.tolist() for layer, heads in state.items()} == {0: [False, True], 1: [True, False]}
        assert all(torch.equal(state[layer], talk.state.retrieval[layer]) for layer in (0, 1))
        assert [each.cell_density().eq(1).tolist() for each in patterns] == [
            [False, False, True, True],
            [True, True, False, False],
        ]
        keys = keys.flip(1)  # whatever heads do later, the split stays


def test_streaming_heads_compute_sinks_and_window_and_retrieval_heads_everything() -> None:
    queries, keys = far_and_near()
    inputs = call(queries, keys, 0, 30, 80, 0, {})
    mask = DuoPrefill(DuoPrefill.Config(**SPLIT)).sparsify(inputs).to_mask()
    for row, at in enumerate(inputs.columns.tolist()):
        everything = [column <= at for column in range(80)]
        near = [column <= at and (column < 3 or at - column < 10) for column in range(80)]
        assert mask[:, row].tolist() == [near, near, everything, everything]


@pytest.mark.parametrize("retention", list(Retention))
@pytest.mark.parametrize("interval", [1, 4])
def test_each_step_attends_to_its_heads_pairs(retention: Retention, interval: int) -> None:
    queries, keys = far_and_near()
    config = DuoDecode.Config(**SPLIT, interval=interval, retention=retention)
    talk = ScriptedConversation(DuoDecode(config), queries, keys)
    for tokens in (60, 1, 40):
        talk.prefill(tokens)
        moved = talk.cache.seen
        for output in range(10):
            if output % interval == 0:
                moved = talk.cache.seen
            near = [*range(3), *range(moved - 10, talk.cache.seen)]
            for layer, streaming in ((0, 0), (1, 1)):
                assert held(talk, layer, streaming) == near
                assert held(talk, layer, 1 - streaming) == list(range(talk.cache.seen))
            talk.decode()


def held(talk: ScriptedConversation, layer: int, head: int) -> list[int]:
    """Positions that the next token will attend to, itself left out."""
    cache = talk.cache.layers[layer]
    if cache.active is not None:
        chosen = cache.active.selection
        return [*chosen.head(head).tolist(), *range(chosen.boundary, talk.cache.seen)]
    positions = cache.positions()[head]
    return positions[positions >= 0].tolist()


def test_a_layer_without_streaming_heads_is_left_alone_and_one_without_others_is_a_window(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    write_scores(str(file), {0: [0.9, 0.8], 1: [0.1, 0.2]}, "tiny")
    assert read_scores(str(file)) == {0: [0.9, 0.8], 1: [0.1, 0.2]}
    config = DuoDecode.Config(**SPLIT, heads=str(file))
    talk = ScriptedConversation(DuoDecode(config), *far_and_near())
    talk.prefill(20)  # a file needs no calibration
    assert talk.active(0) is None
    found = talk.active(1)
    assert found is not None and not found.ragged
    assert found.indices.tolist() == [[0, 1, 2, *range(10, 20)]] * 2
    prefill = DuoPrefill(DuoPrefill.Config(**SPLIT, heads=str(file)))
    queries, keys = far_and_near()
    for layer, dense in ((0, True), (1, False)):
        inputs = call(queries, keys, layer, 0, 20, 0, {})
        assert prefill.refuses(inputs.layer) is None
        assert prefill.sparsify(inputs).cell_density().eq(1).tolist() == [dense] * 4
    missing = make_inputs(layer=2).layer
    assert "has no scores for it" in str(prefill.refuses(missing))
    assert "scores for 2 KV heads" in str(DuoDecode(config).refuses(make_inputs(kv_heads=3).layer))


@pytest.mark.parametrize(
    "text", ["", "[1]", "layers: {}", "layers: {0: [x]}", "layers: {0: [.nan]}", "layers: {x: [1]}"]
)
def test_a_file_that_holds_no_scores_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.yaml"
    file.write_text(text)
    for kind in (DuoPrefill, DuoDecode):
        with pytest.raises(ConfigError, match=r"heads\.yaml"):
            kind(kind.Config(heads=str(file)))


def test_the_search_finds_the_heads_that_look_far_back() -> None:
    queries, keys = far_and_near()
    search = HeadSearch(HeadSearch.Config(sink_tokens=3, recent_window=10))
    with pytest.raises(ConfigError, match="saw no"):
        search.found()
    for layer in (0, 1):
        for start, end in ((0, 10), (10, 90), (90, 150)):
            assert search.sparsify(call(queries, keys, layer, start, end, 0, {})).cell_density().eq(1).all()
    found = search.found()
    assert found[0][1] > 0.5 > 0.2 > found[0][0] and found[1][0] > 0.5 > 0.2 > found[1][1]


@pytest.mark.parametrize("retention", ["keep", "evict"])
def test_both_phases_together_fork_and_undo(retention: str) -> None:
    decode = {"policy": "duo", **SPLIT, "interval": 3, "retention": retention}
    served = engine("llama", {"policy": "duo", **SPLIT}, decode)
    said = SamplingConfig(max_new_tokens=8)
    session = served.session()
    first, second, third = prompts(3, (60, 9, 30))
    list(served.generate(session, first, said, frozenset()))
    other = session.fork()
    answers = [list(served.generate(each, second, said, frozenset())) for each in (session, other)]
    assert answers[0] == answers[1]
    session.undo()
    assert list(served.generate(session, second, said, frozenset())) == answers[0]
    last = [list(served.generate(each, third, said, frozenset())) for each in (session, other)]
    assert last[0] == last[1]
    assert session.stats.compressed_steps > 0
