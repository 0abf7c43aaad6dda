"""Twilight, OmniKV, R-KV and FlowKV against plain loops, over turns and with both retentions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.policies.decode.flowkv import FlowKVDecode
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.decode.knorm import KnormDecode
from loopserve.policies.decode.omnikv import OmniKVDecode, default_places
from loopserve.policies.decode.quest import QuestDecode
from loopserve.policies.decode.rkv import RKVDecode, redundancy
from loopserve.policies.decode.twilight import TwilightDecode, fewest
from loopserve.testing.inputs import make_inputs
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.small import built, registered

HEADS, GROUP, DIM, LENGTH = 2, 2, 16, 160
SCALE = DIM**-0.5


def script(layers: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    keys = torch.randn(layers, HEADS, LENGTH, DIM, generator=source)
    return 2 * torch.randn(layers, HEADS * GROUP, LENGTH, DIM, generator=source), keys


def held(talk: ScriptedConversation, layer: int = 0) -> list[list[int]]:
    """Positions that the next token will attend to, itself left out, per head."""
    cache = talk.cache.layers[layer]
    if cache.active is not None:
        chosen = cache.active.selection
        tail = list(range(chosen.boundary, cache.seen))
        return [[*chosen.head(head).tolist(), *tail] for head in range(HEADS)]
    return [row[row >= 0].tolist() for row in cache.positions().expand(HEADS, -1)]


def softmax(logits: dict[int, float]) -> dict[int, float]:
    top = max(logits.values())
    powers = {at: math.exp(value - top) for at, value in logits.items()}
    return {at: power / sum(powers.values()) for at, power in powers.items()}


def attention(queries: Tensor, keys: Tensor, head: int, row: int, seen: list[int]) -> dict[int, float]:
    """Attention of one row of a query head over some positions of a layer."""
    query = queries[head, row].double()
    return softmax({at: float(query @ keys[head // GROUP, at].double()) * SCALE for at in seen})


def decoded(keys: Tensor, bits: int, page: int) -> Tensor:
    """Keys ``[Hkv, n, D]`` as their codes say they are.

    Codes of 2 bits lie in the part of a complete page's range, 8/8 to 4/8 of it, that gives each channel the least squared error.
    """
    found = torch.empty_like(keys, dtype=torch.float64)
    for start in range(0, keys.shape[1], page):
        part = keys[:, start : start + page].double()
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        middle, reach, least = (low + high) / 2, (high - low) / 2, torch.full_like(low, torch.inf)
        for eighths in (8, 7, 6, 5, 4) if bits == 2 and part.shape[1] == page else (8,):
            low, high = middle - reach * eighths / 8, middle + reach * eighths / 8
            step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
            coded = low + ((part - low) / step).round().clamp(0, 2**bits - 1) * step
            error = (coded - part).square().sum(1, keepdim=True)
            found[:, start : start + page] = torch.where(error < least, coded, found[:, start : start + page])
            least = torch.minimum(error, least)
    return found


def nucleus(weights: dict[int, float], boundary: int, top_p: float) -> set[int]:
    """The fewest positions before a boundary that, with all from there on, hold a share."""
    reached, taken = sum(share for at, share in weights.items() if at >= boundary), set()
    for at in sorted((at for at in weights if at < boundary), key=lambda at: (-weights[at], at)):
        if reached >= top_p:
            break
        taken.add(at)
        reached += weights[at]
    return taken


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("inner", [None, 24])
def test_twilight_keeps_the_fewest_candidates_that_hold_the_share(inner: int | None, bits: int) -> None:
    queries, keys = script()
    inside: Any = FullDecode() if inner is None else QuestDecode(QuestDecode.Config(budget=inner, page=4))
    beside = ScriptedConversation(inside, queries, keys)
    config = TwilightDecode.Config(inner=inside, top_p=0.8, key_bits=bits, page=8)
    talk = ScriptedConversation(TwilightDecode(config), queries, keys)
    for tokens in (50, 1, 30):
        beside.prefill(tokens)
        talk.prefill(tokens)
        end = talk.cache.seen
        for _ in range(6):
            now = talk.cache.seen
            beside.decode()
            talk.decode()
            coded = decoded(keys[0, :, : now + 1], bits, 8)
            active = beside.active()
            boundary = end if active is None else active.boundary
            chosen = talk.active()
            assert chosen is not None and chosen.boundary == boundary
            for head, seen in enumerate(held(beside)):
                wanted: set[int] = set()
                for query_head in range(head * GROUP, (head + 1) * GROUP):
                    query = queries[0, query_head, now].double()
                    weights = softmax({at: float(query @ coded[head, at]) * SCALE for at in seen})
                    wanted |= nucleus(weights, boundary, 0.8)
                assert chosen.head(head).tolist() == sorted(wanted)
                assert set(held(talk)[head]) <= set(seen)
    assert talk.cache.layers[0].stored == talk.cache.seen  # nothing was evicted


def test_twilight_takes_more_where_attention_is_flat() -> None:
    logits = torch.zeros(1, 2, 40)
    logits[0, :, 3] = 9.0
    candidates = torch.ones(1, 40, dtype=torch.bool)
    assert fewest(logits, candidates, 40, 0.9).nonzero()[:, 1].tolist() == [3]
    assert fewest(logits * 0, candidates, 40, 0.5).nonzero()[:, 1].tolist() == list(range(20))
    candidates[0, :10] = False
    assert fewest(logits * 0, candidates, 40, 0.5).nonzero()[:, 1].tolist() == list(range(10, 25))
    assert not fewest(logits, candidates, 3, 1e-3).any()  # what is attended in any case holds the share


def test_twilight_with_the_whole_share_is_the_policy_inside() -> None:
    inner = QuestDecode(QuestDecode.Config(budget=24, page=4))
    talks = [
        ScriptedConversation(each, *script())
        for each in (inner, TwilightDecode(TwilightDecode.Config(inner=inner, top_p=1.0)))
    ]
    for talk in talks:
        for tokens in (50, 30):
            talk.prefill(tokens)
            talk.decode(7)
    assert held(talks[0]) == held(talks[1]) and talks[0].attended == talks[1].attended


@pytest.mark.parametrize("inner", ["h2o", "rocketkv_mt", "recover_alpha", "loopserve", "omnikv"])
def test_twilight_shows_the_policy_inside_what_that_policy_selected(inner: str) -> None:
    """Its candidates are those of the policy alone, whatever is pruned from them."""
    options = {
        "h2o": {"budget": 20},
        "rocketkv_mt": {"budget": 12, "filter_budget": 24, "window": 8, "page": 4},
        "recover_alpha": {"alpha": 0.8, "least": 6, "interval": 3, "window": 8},
        "loopserve": {"budget": 24, "interval": 3, "recent_window": 4, "page_budget": 8, "key_bits": 4, "page": 8},
        "omnikv": {"budget": 24},
    }[inner]
    kind = registered().named(inner)[-1].kind
    written = {"policy": inner, **options}
    alone = ScriptedConversation(built(kind, written), *script(2))
    talk = ScriptedConversation(built(kind, {"policy": "twilight", "top_p": 0.6, "inner": written}), *script(2))
    pruned = 0
    for tokens in (60, 20):
        for each in (alone, talk):
            each.prefill(tokens)
        for _ in range(7):
            for each in (alone, talk):
                each.decode()
            for layer in range(2):
                candidates = talk.state.candidates.get(layer)
                assert (alone.active(layer) is None) == (candidates is None)
                if candidates is not None:
                    assert [candidates.head(head).tolist() for head in range(HEADS)] == [
                        alone.cache.layers[layer].active.selection.head(head).tolist() for head in range(HEADS)
                    ]
                pruned += sum(map(len, held(alone, layer))) - sum(map(len, held(talk, layer)))
    assert pruned > 0


def test_omnikv_shares_the_selection_of_a_filter_layer_with_the_layers_behind_it() -> None:
    queries, keys = script(6)
    policy = OmniKVDecode(OmniKVDecode.Config(budget=20, filter_layers=(1, 3)))
    talk = ScriptedConversation(policy, queries, keys)
    for tokens in (40, 1, 25):
        talk.prefill(tokens)
        end = talk.cache.seen
        for _ in range(5):
            now = talk.cache.seen
            talk.decode()
            assert [talk.active(layer) is None for layer in range(6)] == [True, True, False, True, False, False]
            for layer, source in ((2, 1), (4, 3), (5, 3)):
                rows = [attention(queries[source], keys[source], head, now, list(range(now + 1))) for head in range(4)]
                largest = {at: max(row[at] for row in rows) for at in range(end)}
                wanted = sorted(sorted(largest, key=lambda at: (-largest[at], at))[:20])
                chosen = talk.active(layer)
                assert chosen is not None and chosen.boundary == end
                assert [chosen.head(head).tolist() for head in range(HEADS)] == [wanted, wanted]
    assert all(layer.stored == talk.cache.seen for layer in talk.cache.layers)


def test_omnikv_selects_nothing_within_its_budget() -> None:
    talk = ScriptedConversation(OmniKVDecode(OmniKVDecode.Config(budget=40)), *script(4))
    talk.prefill(40)
    talk.decode(5)
    assert all(talk.active(layer) is None for layer in range(4)) and "scoring" not in talk.record.bytes


def test_omnikv_places_its_filter_layers_by_depth_among_its_own_layers() -> None:
    assert default_places(32) == (2, 8, 18) and default_places(30) == (1, 7, 16)
    for layers in range(40):
        places = default_places(layers)
        assert all(place + 1 < layers and place + 1 not in places for place in places)
        assert bool(places) == (layers >= 2)
    full = tuple(LayerSpec(index, LayerType.FULL, 4, 2, 8) for index in (5, 11, 17, 23))
    assert OmniKVDecode().filters(full) == (5, 17)
    assert OmniKVDecode(OmniKVDecode.Config(filter_layers=(0, 11))).filters(full) == (11,)


def naive_rkv(queries: Tensor, keys: Tensor, head: int, rows: list[int], alive: list[int], config: Any) -> list[int]:
    """The pairs that R-KV keeps of those alive, by the last rows, in loops."""
    before = [at for at in alive if at not in rows]
    votes = dict.fromkeys(before, 0.0)
    for row in rows:
        logits = {}
        for at in before:
            group = range(head * GROUP, (head + 1) * GROUP)
            logits[at] = max(float(queries[each, row].double() @ keys[head, at].double()) * SCALE for each in group)
        for at, share in softmax(logits).items():
            votes[at] += share / len(rows)
    near = config.kernel // 2
    pooled = {
        at: max(votes[each] for each in before[max(place - near, 0) : place + near + 1])
        for place, at in enumerate(before)
    }
    counted = dict.fromkeys(alive, 0.0)
    for one in alive:
        cosines = {}
        for other in alive:
            pair = keys[head, one].double(), keys[head, other].double()
            cosines[other] = 0.0 if one == other else float(pair[0] @ pair[1] / pair[0].norm() / pair[1].norm())
        similar = [other for other in alive if cosines[other] > config.threshold]
        for other in alive:
            if not similar or other != similar[-1]:
                counted[other] += cosines[other] / len(alive)
    alike = softmax(counted)
    scores = {at: config.mix * pooled[at] - (1 - config.mix) * alike[at] for at in before}
    best = sorted(before, key=lambda at: (-scores[at], at))[: config.budget - len(rows)]
    return sorted([*best, *rows])


@pytest.mark.parametrize("retention", list(Retention))
@pytest.mark.parametrize("mix", [0.1, 0.9])
def test_rkv_keeps_what_plain_loops_keep(mix: float, retention: Retention) -> None:
    queries, keys = script(seed=3)
    keys[0, :, 20:32] = keys[0, :, 8:20] + 0.3 * keys[0, :, 40:52]  # a passage that is there twice
    config = RKVDecode.Config(
        budget=18, window=4, interval=6, mix=mix, threshold=0.3, kernel=3, retention=retention, sink_tokens=0
    )
    talk = ScriptedConversation(RKVDecode(config), queries, keys)
    alive: list[list[int]] = [[], []]
    for tokens, outputs in ((40, 14), (2, 7), (25, 3)):
        start = talk.cache.seen
        talk.prefill(tokens)
        for head in range(HEADS):
            fresh = list(range(start, start + tokens))
            if retention is Retention.KEEP:
                alive[head] = list(range(start))
            rows = list(range(start + max(tokens - 4, 0), start + tokens))
            alive[head] = naive_rkv(queries[0], keys[0], head, rows, alive[head] + fresh, config)
        assert held(talk) == alive
        for output in range(1, outputs + 1):
            talk.decode()
            now = talk.cache.seen
            for head in range(HEADS):
                alive[head].append(now - 1)
                if output % 6 == 0:
                    rows = list(range(now - 4, now))
                    alive[head] = naive_rkv(queries[0], keys[0], head, rows, alive[head], config)
            assert held(talk) == alive
    stored = talk.cache.layers[0].stored
    assert stored == (len(alive[0]) if retention is Retention.EVICT else talk.cache.seen)


def test_rkv_counts_a_repeated_key_as_redundant_and_excuses_its_latest_copy() -> None:
    source = torch.Generator().manual_seed(0)
    keys = torch.randn(60, DIM, generator=source)
    keys[10] = keys[30] = keys[50]
    found = redundancy(keys, 0.9)
    others = torch.ones(60, dtype=torch.bool)
    others[[10, 30, 50]] = False
    assert float(found.sum()) == pytest.approx(1.0)
    assert found[10] > found[50] and found[30] > found[50]


@pytest.mark.parametrize("chunks", [[60], [7, 1, 49, 3]])
def test_rkv_does_not_care_how_a_prefill_is_cut(chunks: list[int]) -> None:
    found = []
    for pieces in ([60], chunks):
        talk = ScriptedConversation(RKVDecode(RKVDecode.Config(budget=20)), *script())
        talk.prefill(30)
        talk.prefill(60, pieces)
        found.append(held(talk))
    assert found[0] == found[1]


@pytest.mark.parametrize("retention", list(Retention))
def test_flowkv_compresses_each_turn_once(retention: Retention) -> None:
    queries, keys = script()
    inner = KnormDecode(KnormDecode.Config(budget=12, sink_tokens=1, recent_window=2, retention=retention))
    talk = ScriptedConversation(FlowKVDecode(FlowKVDecode.Config(inner=inner)), queries, keys)
    kept: list[list[int]] = [[], []]
    done = 0
    for tokens, outputs in ((8, 2), (30, 9), (1, 3), (40, 5)):
        talk.prefill(tokens)
        end = talk.cache.seen
        for head in range(HEADS):
            norms = {at: float(keys[0, head, at].norm()) for at in range(done, end)}
            forced = [done, end - 2, end - 1]
            ranked = sorted(norms, key=lambda at: (at not in forced, norms[at], at))
            kept[head] += sorted(ranked[:12])
        done = end
        talk.decode(outputs)
        now = talk.cache.seen
        assert held(talk) == [[*each, *range(end, now)] for each in kept]
    assert talk.cache.layers[0].stored == (talk.cache.seen if retention is Retention.KEEP else len(kept[0]) + 5)


def test_flowkv_keeps_what_its_inner_policy_would_have_dropped_in_a_later_turn() -> None:
    inner = {"policy": "snapkv", "budget": 16, "window": 4, "retention": "evict"}
    kind = registered().named("flowkv")[0].kind
    plain = ScriptedConversation(built(kind, inner), *script())
    isolated = ScriptedConversation(built(kind, {"policy": "flowkv", "inner": inner}), *script())
    for talk in (plain, isolated):
        talk.prefill(50)
    first = held(plain)
    assert held(isolated) == first
    for talk in (plain, isolated):
        talk.prefill(50)
    assert not all(set(one) <= set(two) for one, two in zip(first, held(plain), strict=True))
    assert all(set(one) <= set(two) for one, two in zip(first, held(isolated), strict=True))
    assert [len(each) for each in held(isolated)] == [32, 32]


@pytest.mark.parametrize("inner", ["adakv", "chunkkv", "pyramidkv", "h2o", "rkv"])
@pytest.mark.parametrize("retention", list(Retention))
def test_flowkv_wraps_any_scored_policy(inner: str, retention: Retention) -> None:
    kind = registered().named(inner)[0].kind
    plain = {"policy": "snapkv", "budget": 16, "window": 4, "retention": retention.value}
    own = {"policy": inner, "budget": 16, "retention": retention.value}
    written = own if inner in ("h2o", "rkv") else {"policy": inner, "inner": plain}
    talk = ScriptedConversation(built(kind, {"policy": "flowkv", "inner": written}), *script(2))
    for turn, tokens in enumerate((50, 40, 30)):
        before = [held(talk, layer) for layer in range(2)] if turn else []
        talk.prefill(tokens)
        for layer in range(2):
            now = held(talk, layer)
            for head in range(HEADS):
                assert not turn or set(before[layer][head]) <= set(now[head])
    assert sum(len(each) for layer in range(2) for each in held(talk, layer)) == 4 * 16 * 3


def test_flowkv_is_the_outermost_wrapper() -> None:
    kind = registered().named("adakv")[0].kind
    inner = {"policy": "flowkv", "inner": {"policy": "snapkv"}}
    with pytest.raises(Exception, match="'flowkv' gives no score per pair"):
        built(kind, {"policy": "adakv", "inner": inner})
    with pytest.raises(ValidationError):
        FlowKVDecode.Config(inner=FullDecode())


def test_rkv_scores_do_not_depend_on_filler() -> None:
    inputs = make_inputs(new_tokens=20, total_tokens=60, turn=1, evicted=8, ragged=5)
    policy = RKVDecode(RKVDecode.Config(budget=24))
    scores = policy.score(inputs)
    assert inputs.first_valid is not None
    for head, first in enumerate(inputs.first_valid.tolist()):
        inputs.keys[head, :first] = 100.0
    assert torch.equal(policy.score(inputs), scores)
