"""Decode policies against plain loops: those that kvpress lacks or does otherwise, and later turns of those it has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.policies.attended import attention_over
from loopserve.policies.decode.chunkkv import ChunkKVDecode
from loopserve.policies.decode.expected_attention import ExpectedAttentionDecode
from loopserve.policies.decode.h2o import H2ODecode
from loopserve.policies.decode.knorm import KnormDecode
from loopserve.policies.decode.lagkv import LagKVDecode
from loopserve.policies.decode.quest import QuestDecode
from loopserve.policies.decode.recover_alpha import RecoverAlphaDecode, fewest
from loopserve.policies.decode.rocketkv_mt import RocketKVMTDecode
from loopserve.policies.decode.tova import TOVADecode
from loopserve.testing.inputs import make_inputs
from loopserve.testing.scripted import ScriptedConversation

HEADS, GROUP, DIM, LENGTH = 2, 2, 16, 120
SCALE = DIM**-0.5


def script(seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, HEADS, LENGTH, DIM, generator=source)
    return 2 * torch.randn(1, HEADS * GROUP, LENGTH, DIM, generator=source), keys


def weights(queries: Tensor, keys: Tensor, row: int, head: int, seen: list[int]) -> dict[int, float]:
    """Attention of one row over some positions, mean over the group of a KV head."""
    found = dict.fromkeys(seen, 0.0)
    for member in range(GROUP):
        query = queries[0, head * GROUP + member, row].double()
        powers = {at: math.exp(float(query @ keys[0, head, at].double()) * SCALE) for at in seen}
        total = sum(powers.values())
        for at, power in powers.items():
            found[at] += power / total / GROUP
    return found


def best(scores: dict[int, float], count: int, forced: list[int]) -> list[int]:
    ranked = sorted(scores, key=lambda at: (at not in forced, -scores[at], at))
    return sorted(ranked[:count])


class Rolling:
    """One KV head of a method that lets a pair go with every output, by loops."""

    def __init__(self, name: str, head: int, budget: int, evicts: bool) -> None:
        self.name, self.head, self.budget, self.evicts = name, head, budget, evicts
        self.queries, self.keys = script()
        self.alive: list[int] = []
        self.mass: dict[int, float] = {}
        self.length = 0

    def prefill(self, tokens: int) -> list[int]:
        if not self.evicts:
            self.alive = list(range(self.length))
        last: dict[int, float] = {}
        for _ in range(tokens):
            last = self._see()
        return self._let_go(last)

    def decode(self) -> list[int]:
        return self._let_go(self._see())

    def _see(self) -> dict[int, float]:
        self.alive.append(self.length)
        found = weights(self.queries, self.keys, self.length, self.head, self.alive)
        for at, share in found.items():
            self.mass[at] = self.mass.get(at, 0.0) + share
        self.length += 1
        return found

    def _let_go(self, last: dict[int, float]) -> list[int]:
        if len(self.alive) > self.budget:
            scores = last if self.name == "tova" else {at: self.mass[at] for at in self.alive}
            recent = 1 if self.name == "tova" else self.budget - math.ceil(self.budget / 2)
            self.alive = best(scores, self.budget, self.alive[-recent:])
        return list(self.alive)


def shared(heads: list[Rolling], step: str, *arguments: int) -> list[list[int]]:
    """One step of all heads. TOVA's heads choose together: by the mean of what they see."""
    if heads[0].name != "tova":
        return [getattr(head, step)(*arguments) for head in heads]
    rows = []
    for head in heads:
        if step == "prefill" and not head.evicts:
            head.alive = list(range(head.length))
        for _ in range(*arguments or (1,)):
            seen = head._see()
        rows.append(seen)
    mean = {at: sum(row[at] for row in rows) / len(rows) for at in rows[0]}
    return [head._let_go(mean) for head in heads]


@pytest.mark.parametrize("retention", list(Retention))
@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_rolling_methods_keep_what_plain_loops_keep(name: str, retention: Retention) -> None:
    made: Any = H2ODecode if name == "h2o" else TOVADecode
    talk = ScriptedConversation(made(made.Config(budget=17, retention=retention)), *script())
    heads = [Rolling(name, head, 17, retention is Retention.EVICT) for head in range(HEADS)]
    for tokens, outputs in ((11, 3), (23, 9), (1, 4), (30, 5)):
        talk.prefill(tokens)
        assert held(talk) == shared(heads, "prefill", tokens)
        for _ in range(outputs):
            talk.decode()
            assert held(talk) == shared(heads, "decode")


def held(talk: ScriptedConversation) -> list[list[int]]:
    """Positions that the next token will attend to, per head."""
    layer = talk.cache.layers[0]
    if layer.active is not None:
        chosen = layer.active.selection
        tail = list(range(chosen.boundary, talk.cache.seen))
        return [[*chosen.head(head).tolist(), *tail] for head in range(HEADS)]
    rows = layer.positions().expand(HEADS, -1)
    return [row[row >= 0].tolist() for row in rows]


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_without_rolling_outputs_come_on_top(name: str) -> None:
    made: Any = H2ODecode if name == "h2o" else TOVADecode
    talk = ScriptedConversation(made(made.Config(budget=17, rolling=False)), *script())
    talk.prefill(40)
    talk.decode(6)
    assert [len(each) for each in held(talk)] == [17 + 6] * HEADS


def test_what_is_attended_follows_selection_boundary_and_filler() -> None:
    inputs = make_inputs(new_tokens=1, total_tokens=20, evicted=6, ragged=4, phase=Phase.DECODE)
    assert torch.equal(inputs.attended(inputs.selection), inputs.holds)
    plain = make_inputs(new_tokens=1, total_tokens=20, phase=Phase.DECODE)
    chosen = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    spread = attention_over(plain, chosen)
    whole = plain.token_scores(plain.queries, plain.columns)
    assert torch.allclose(spread.sum(-1), torch.ones(2)) and (spread[~chosen] == 0).all()
    assert torch.allclose(attention_over(plain, torch.ones_like(chosen)), whole, atol=1e-6)


@pytest.mark.parametrize(("page", "budget"), [(4, 16), (4, 17), (16, 33), (5, 24), (1, 9)])
def test_quest_attends_to_the_pages_of_highest_bound(page: int, budget: int) -> None:
    queries, keys = script()
    talk = ScriptedConversation(QuestDecode(QuestDecode.Config(page=page, budget=budget)), queries, keys)
    talk.prefill(50)
    for _ in range(20):
        now = talk.cache.seen  # position of the token about to be processed
        talk.decode()
        boundary = now // page * page
        for head, found in enumerate(held(talk)):
            bounds: list[tuple[float, int]] = []
            for start in range(0, boundary, page):
                low = keys[0, head, start : start + page].amin(0)
                high = keys[0, head, start : start + page].amax(0)
                rows = queries[0, head * GROUP : (head + 1) * GROUP, now]
                bounds.append((-max(float(torch.maximum(q * low, q * high).sum()) for q in rows), start))
            ranked = [at for _, start in sorted(bounds) for at in range(start, start + page)]
            assert found == sorted([*ranked[: budget - (now + 1 - boundary)], *range(boundary, now + 1)])
            assert len(found) == budget


def test_quest_reads_bounds_only_where_it_has_to_choose() -> None:
    talk = ScriptedConversation(QuestDecode(QuestDecode.Config(page=8, budget=48)), *script())
    talk.prefill(40)
    talk.decode(8)
    assert talk.active() is None and "summaries" not in talk.record.bytes
    talk.decode(1)
    assert talk.active() is not None
    assert talk.record.bytes["summaries"] == 2 * HEADS * 7 * DIM * 4  # 49 keys fill seven pages, the last in part
    assert talk.compressor.held_bytes(talk.state) == talk.record.bytes["summaries"]


def test_rocketkv_filters_once_per_turn_and_chooses_pages_within() -> None:
    queries, keys = script()
    config = RocketKVMTDecode.Config(budget=10, filter_budget=24, window=4, kernel=3, page=4, channels=6)
    talk = ScriptedConversation(RocketKVMTDecode(config), queries, keys)
    for tokens in (30, 25):
        talk.prefill(tokens)
        end = talk.cache.seen
        filtered = [naive_filter(queries, keys, head, end, config) for head in range(HEADS)]
        for _ in range(6):
            now = talk.cache.seen
            talk.decode()
            chosen = talk.active()
            assert chosen is not None and chosen.boundary == end
            for head in range(HEADS):
                assert chosen.head(head).tolist() == naive_pages(queries, keys, head, now, filtered[head], config)
    assert talk.cache.layers[0].stored == 30 + 25 + 12  # nothing was evicted


def naive_filter(queries: Tensor, keys: Tensor, head: int, end: int, config: RocketKVMTDecode.Config) -> list[int]:
    votes = [0.0] * (end - config.window)
    for row in range(end - config.window, end):
        for at, share in weights(queries, keys, row, head, list(range(row + 1))).items():
            if at < len(votes):
                votes[at] += share
    near = config.kernel // 2
    pooled = {at: max(votes[max(at - near, 0) : at + near + 1]) for at in range(len(votes))}
    window = list(range(end - config.window, end))
    return best(pooled | dict.fromkeys(window, math.inf), config.filter_budget, window)


def naive_pages(
    queries: Tensor, keys: Tensor, head: int, now: int, filtered: list[int], config: RocketKVMTDecode.Config
) -> list[int]:
    rows = queries[0, head * GROUP : (head + 1) * GROUP, now].double()
    channels = rows.abs().sum(0).topk(config.channels or 0).indices
    bounds = []
    for start in range(0, len(filtered), config.page):
        inside = keys[0, head, filtered[start : start + config.page]].double()[:, channels]
        low, high = inside.amin(0), inside.amax(0)
        bounds.append((-max(float(torch.maximum(q * low, q * high).sum()) for q in rows[:, channels]), start))
    ranked = [at for _, start in sorted(bounds) for at in filtered[start : start + config.page]]
    return sorted(ranked[: config.budget])


@pytest.mark.parametrize("alpha", [0.3, 0.8, 0.99, 1.0])
def test_recover_alpha_takes_the_fewest_pairs_that_reach_the_share(alpha: float) -> None:
    queries, keys = script()
    config = RecoverAlphaDecode.Config(alpha=alpha, window=4, interval=3, least=1, sink_tokens=1, recent_window=2)
    talk = ScriptedConversation(RecoverAlphaDecode(config), queries, keys)
    for tokens in (30, 25):
        talk.prefill(tokens)
        end = talk.cache.seen
        check_fewest(talk, list(range(end - 4, end)), end, alpha)
        for _ in range(2):
            talk.decode(3)
            now = talk.cache.seen
            check_fewest(talk, list(range(now - 3, now)), end, alpha)


def check_fewest(talk: ScriptedConversation, rows: list[int], end: int, alpha: float) -> None:
    chosen = talk.active()
    assert chosen is not None and chosen.boundary == end
    for head in range(HEADS):
        mass = [0.0] * (rows[-1] + 1)
        for row in rows:
            for at, share in weights(talk.queries, talk.keys, row, head, list(range(row + 1))).items():
                mass[at] += share / len(rows)
        forced = [0, end - 2, end - 1]
        kept = list(forced)
        for at in sorted((at for at in range(end) if at not in forced), key=lambda at: (-mass[at], at)):
            if sum(mass[k] for k in kept) + sum(mass[end:]) >= alpha * sum(mass) * (1 - 1e-6):
                break
            kept.append(at)
        if alpha < 1:  # at 1 the last of them hang on rounding
            assert chosen.head(head).tolist() == sorted(kept)
        assert sum(mass[k] for k in chosen.head(head).tolist()) + sum(mass[end:]) >= alpha * sum(mass) - 1e-5


def test_recover_alpha_is_bounded_by_least_and_most() -> None:
    mass = torch.tensor([[0.7, 0.1, 0.1, 0.05, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]])
    none, nothing = torch.zeros(2), torch.zeros(5, dtype=torch.bool)
    assert fewest(mass, none, nothing, 0.75, 1, None).tolist() == [
        [True, True, False, False, False],
        [True] * 4 + [False],
    ]
    assert fewest(mass, none, nothing, 0.75, 3, None).sum(-1).tolist() == [3, 4]
    assert fewest(mass, none, nothing, 0.75, 1, 3).sum(-1).tolist() == [2, 3]
    assert fewest(mass, torch.tensor([3.0, 0.0]), nothing, 0.75, 1, None).sum(-1).tolist() == [1, 4]


def test_expected_attention_of_a_later_turn_equals_its_formula() -> None:
    inputs = make_inputs(new_tokens=20, total_tokens=50, evicted=7, seed=3)
    config = ExpectedAttentionDecode.Config(budget=20, sink_tokens=2, recent_window=0, future=9, epsilon=1e-3)
    found = ExpectedAttentionDecode(config).score(inputs)
    for head in range(2):
        wanted = naive_expected(inputs, head, config)
        assert found[head, :2].isposinf().all()
        assert torch.allclose(found[head, 2:].double(), wanted, rtol=1e-4)


def rotation(position: int, dim: int) -> Tensor:
    """The matrix that turns a column vector to a position, angle by angle."""
    matrix, half = torch.zeros(dim, dim, dtype=torch.float64), dim // 2
    for channel in range(half):
        angle = position * 10_000.0 ** (-channel / half)
        matrix[channel, channel] = matrix[channel + half, channel + half] = math.cos(angle)
        matrix[channel, channel + half], matrix[channel + half, channel] = -math.sin(angle), math.sin(angle)
    return matrix


def naive_expected(inputs: AttentionInputs, head: int, config: ExpectedAttentionDecode.Config) -> Tensor:
    dim, length = inputs.keys.shape[2], inputs.length
    ahead = sum((rotation(length + step, dim) for step in range(config.future)), torch.zeros(dim, dim)) / config.future
    spread = torch.zeros(inputs.total_tokens - 2, dtype=torch.float64)
    for member in range(2):
        back = []
        for row, column in enumerate(inputs.columns.tolist()):
            position = int(inputs.head_positions(head)[column])
            back.append(rotation(position, dim).T @ inputs.queries[head * 2 + member, row].double())
        rows = torch.stack(back)
        mean, centred = rows.mean(0), rows - rows.mean(0)
        covariance = ahead @ (centred.T @ centred / len(rows)) @ ahead.T
        keys = inputs.keys[head, 2:].double()
        logits = keys @ (ahead @ mean) / dim**0.5 + ((keys @ covariance) * keys).sum(-1) / dim / 2
        spread += logits.softmax(-1) / 2
    return (spread + config.epsilon) * inputs.values[head, 2:].double().norm(dim=-1)


def test_expected_attention_does_not_care_how_a_prefill_is_cut() -> None:
    queries, keys = script()
    found = []
    for chunks in ([60], [7, 1, 30, 22]):
        policy = ExpectedAttentionDecode(ExpectedAttentionDecode.Config(budget=20, recent_window=2, future=16))
        talk = ScriptedConversation(policy, queries, keys)
        talk.prefill(30)
        talk.prefill(60, chunks)
        chosen = talk.active()
        assert chosen is not None
        found.append(chosen.indices)
    assert torch.equal(*found)


def test_lagkv_survives_a_channel_that_never_changes() -> None:
    """kvpress divides by zero there."""
    for cross in (False, True):
        inputs = make_inputs(new_tokens=70, total_tokens=70)
        inputs.keys[..., 3] = 1.0
        scores = LagKVDecode(LagKVDecode.Config(budget=40, lag=8, recent_window=4, cross_scoring=cross)).score(inputs)
        assert torch.isfinite(scores).all()


def test_h2o_does_not_care_how_a_prefill_is_cut() -> None:
    found = []
    for chunks in ([60], [7, 1, 30, 22]):
        talk = ScriptedConversation(H2ODecode(H2ODecode.Config(budget=20)), *script())
        talk.prefill(30)
        talk.prefill(60, chunks)
        chosen = talk.active()
        assert chosen is not None
        found.append(chosen.indices)
    assert torch.equal(*found)


@pytest.mark.parametrize("budget", [13, 20, 24])
def test_chunkkv_keeps_whole_chunks_and_the_first_part_of_one_more(budget: int) -> None:
    """kvpress rounds the number of chunks down instead: its budget is not honoured, so loops are the oracle here."""
    inputs = make_inputs(new_tokens=20, total_tokens=47, seed=2)
    inner = KnormDecode(KnormDecode.Config(budget=budget, sink_tokens=0, recent_window=0))
    policy = ChunkKVDecode(ChunkKVDecode.Config(inner=inner, chunk=5))
    scores = inner.score(inputs).sum(0)
    chunks = [list(range(start, min(start + 5, 47))) for start in range(0, 47, 5)]
    ranked = sorted(chunks, key=lambda chunk: -sum(float(scores[at]) for at in chunk) / len(chunk))
    wanted = sorted([at for chunk in ranked for at in chunk][:budget])
    state = policy.init_state()
    policy.after_attention(inputs, state)
    assert [state.pending[0].head(head).tolist() for head in range(2)] == [wanted, wanted]
