"""The attention map counts the same pairs as the figures of a turn, each in the bucket where it lies."""

from __future__ import annotations

import pytest
import torch

from loopserve import Engine
from loopserve.core.engine.attention_map import AttentionMap, bucket_edges, bucket_turn


def test_pairs_fall_into_their_buckets() -> None:
    counts = AttentionMap([0, 4, 8])
    selected = torch.tensor([[-1, 0, 5], [0, 3, 6]], dtype=torch.long, device="cpu")
    counts.add(0, selected, 7, heads=2, seen=10)
    counts.add(1, None, 0, heads=2, seen=10)
    assert counts.attended == [[3 + 8, 2 + 2 + 8, 4 + 4]]
    assert counts.dense == [[16, 16, 8]]
    counts.add(0, selected, 7, heads=2, seen=11)
    assert counts.attended[1] == [3, 4, 6] and counts.dense[1] == [8, 8, 6]
    assert counts.share() == [14 / 24, 16 / 24, 1.0]
    assert counts.last() == [3 / 8, 4 / 8, 1.0]
    assert counts.shares(1) == [counts.share()] and len(counts.shares(2)) == 2


def test_another_selection_of_a_layer_is_counted_anew() -> None:
    counts = AttentionMap([0, 2, 4])
    for step, index in enumerate((0, 3, 3)):
        counts.add(0, torch.tensor([[index]], dtype=torch.long, device="cpu"), 4, heads=1, seen=5 + step)
    assert counts.attended == [[1, 0, 1], [0, 1, 2], [0, 1, 3]]


@pytest.mark.parametrize(("ends", "most"), [((10,), 4), ((3, 100, 101), 64), (tuple(range(5, 505, 5)), 64), ((1,), 64)])
def test_edges_rise_to_the_end_and_keep_turns_apart(ends: tuple[int, ...], most: int) -> None:
    edges = bucket_edges(ends, most)
    assert edges[0] == 0 and edges[-1] == ends[-1] and len(edges) <= most
    assert edges == sorted(set(edges))
    if len(ends) < most:
        assert set(ends) <= set(edges)
    assert [bucket_turn(ends, end - 1) for end in ends] == list(range(len(ends)))


@pytest.mark.parametrize("edges", [(), (1, 2), (0, 0)])
def test_edges_that_do_not_rise_from_zero_are_refused(edges: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="edges must rise from 0"):
        AttentionMap(edges)


@pytest.mark.parametrize("stack", ["loopserve", "snapkv", "streaming_llm", "quest", "dense"])
def test_its_sum_is_what_the_figures_count(stack: str) -> None:
    engine = Engine.from_pretrained("demo", stack, dtype="float32")
    with engine.session() as session:
        session.send("the code of lisbon is amber falcon river . " * 20)
        core = session.open_session
        core.attention_map = counts = AttentionMap(bucket_edges([20, len(core.tokens)], 9))
        session.send("what is the code of lisbon ?", temperature=0.0, max_new_tokens=8, ignore_eos=True)
        pairs, fraction = (core.stats.means[name] for name in ("attended_pairs", "attended_fraction"))
        assert counts.steps == core.stats.decode_steps > 0
        assert sum(map(sum, counts.attended)) == pairs.total
        assert sum(map(sum, counts.dense)) == fraction.weight
