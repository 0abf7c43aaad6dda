"""Prefill policies against plain loops, for turns shorter than what they look at, and with pairs evicted before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.core.errors import ConfigError
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import BlockPattern, LinePattern
from loopserve.policies.blocks import largest_share
from loopserve.policies.lines import lines_counted_apart
from loopserve.policies.prefill.flashprefill import FlashPrefillPrefill
from loopserve.policies.prefill.flexprefill import FlexPrefillPrefill, blocks_of_lines
from loopserve.policies.prefill.line_sizes import SizeSearch, read_sizes, scaled, write_sizes
from loopserve.policies.prefill.loopserve import LoopServePrefill
from loopserve.policies.prefill.minference import MInferencePrefill
from loopserve.policies.prefill.sample_attention import SampleAttentionPrefill
from loopserve.policies.prefill.static_lines import StaticLinesPrefill
from loopserve.policies.prefill.topk_blocks import TopKBlocksPrefill
from loopserve.policies.prefill.tri_shape import TriShapePrefill
from loopserve.policies.prefill.xattention import XAttentionPrefill
from loopserve.testing.assertions import assert_pattern, unchanged
from loopserve.testing.inputs import make_inputs
from loopserve.testing.strategies import attention_inputs
from tests.policies.conversations import answers, engine
from tests.policies.small import SPARSIFIERS, label, small

CALLS = [
    {"new_tokens": 40, "total_tokens": 40},
    {"new_tokens": 19, "total_tokens": 61, "structured": True},
    {"new_tokens": 30, "total_tokens": 53, "evicted": 9, "ragged": 13, "seed": 5},
]


def probabilities(inputs: AttentionInputs, rows: list[int]) -> Tensor:
    """Softmax of some rows by definition, float64 ``[Hq, r, Tk]``."""
    found = torch.zeros(inputs.queries.shape[0], len(rows), inputs.total_tokens, dtype=torch.float64)
    for head in range(len(found)):
        keys = inputs.keys[head // inputs.group].double()
        first = 0 if inputs.first_valid is None else int(inputs.first_valid[head // inputs.group])
        for number, row in enumerate(rows):
            seen = slice(first, int(inputs.columns[row]) + 1)
            logits = keys[seen] @ inputs.queries[head, row].double() * inputs.scaling
            found[head, number, seen] = logits.softmax(-1)
    return found


def line_masses(inputs: AttentionInputs, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Mass by column and by offset, ``[Hq, Tk]`` each."""
    found = probabilities(inputs, rows)
    slash = torch.zeros(len(found), inputs.total_tokens, dtype=torch.float64)
    for number, row in enumerate(rows):
        at = int(inputs.columns[row])
        for column in range(at + 1):
            slash[:, at - column] += found[:, number, column]
    return found.sum(1), slash


def first_of(inputs: AttentionInputs, head: int) -> int:
    return 0 if inputs.first_valid is None else int(inputs.first_valid[head // inputs.group])


def lines_mask(inputs: AttentionInputs, verticals: list[set[int]], slashes: list[set[int]]) -> Tensor:
    cells = torch.zeros(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens, dtype=torch.bool)
    for head, (down, along) in enumerate(zip(verticals, slashes, strict=True)):
        for row, at in enumerate(inputs.columns.tolist()):
            for column in range(at + 1):
                cells[head, row, column] = column in down or at - column in along or column == at
    return cells


def real(inputs: AttentionInputs, cells: Tensor) -> Tensor:
    """Cells without those of filler columns, which no kernel computes whatever a pattern says."""
    return cells & inputs.holds.repeat_interleave(inputs.group, dim=0)[:, None]


def heaviest(mass: Tensor, count: int, forced: set[int]) -> set[int]:
    ranked = sorted(range(len(mass)), key=lambda line: (line not in forced, -float(mass[line]), line))
    return set(ranked[: max(count, len(forced))])


@pytest.mark.parametrize("call", CALLS)
def test_minference_takes_the_heaviest_lines_of_the_last_rows(call: dict[str, Any]) -> None:
    inputs = make_inputs(**call)
    policy = MInferencePrefill(
        MInferencePrefill.Config(vertical_size=7, slash_size=9, last_rows=8, sink_tokens=2, local_window=4)
    )
    vertical, slash = line_masses(inputs, list(range(inputs.new_tokens - 8, inputs.new_tokens)))
    heads = range(inputs.queries.shape[0])
    downs = [heaviest(vertical[h], 7, set(range(first_of(inputs, h), first_of(inputs, h) + 2))) for h in heads]
    alongs = [heaviest(slash[h], 9, set(range(4))) for h in heads]
    found = policy.sparsify(inputs)
    assert torch.equal(real(inputs, found.to_mask()), real(inputs, lines_mask(inputs, downs, alongs)))


def test_minference_reads_sizes_per_head(tmp_path: Path) -> None:
    inputs = make_inputs(new_tokens=30, total_tokens=60)
    sizes = {0: [(3, 4), (5, 6), (9, 2), (1, 12)]}
    file = tmp_path / "sizes.json"
    write_sizes(str(file), sizes, "tiny")
    assert {layer: [tuple(each) for each in heads] for layer, heads in read_sizes(str(file)).items()} == sizes
    config = MInferencePrefill.Config(sizes=str(file), sink_tokens=0, local_window=1)
    pattern = MInferencePrefill(config).sparsify(inputs)
    assert isinstance(pattern, LinePattern)
    assert pattern.verticals.sum(-1).tolist() == [3, 5, 9, 1]
    assert pattern.slashes.sum(-1).tolist() == [4, 6, 2, 12]
    policy = MInferencePrefill(config)
    assert policy.refuses(inputs.layer) is None
    file.write_text("layers: {0: [[3, 4]]}")
    assert "sizes for 1 heads" in str(MInferencePrefill(config).refuses(inputs.layer))


@pytest.mark.parametrize(
    "text", ["", "[1]", "layers: 3", "layers: {0: [[1]]}", "layers: {0: [[0, 3]]}", "layers: {x: []}", "a: {"]
)
def test_a_file_that_holds_no_sizes_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "sizes.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"sizes\.yaml"):
        MInferencePrefill(MInferencePrefill.Config(sizes=str(file)))
    with pytest.raises(ConfigError, match=r"sizes\.yaml"):
        StaticLinesPrefill(StaticLinesPrefill.Config(lines=str(file)))


def test_the_search_finds_heads_that_look_down_and_heads_that_look_along() -> None:
    inputs = make_inputs(new_tokens=256, total_tokens=256, kv_heads=2, group=1, head_dim=32, seed=1)
    inputs.keys[:, :, :2] = 0
    inputs.queries[:, :, :2] = 0
    inputs.keys[0, 10:60, 0] = 12.0  # head 0 looks at fifty columns
    inputs.queries[0, :, 0] = 12.0
    turns = torch.arange(256) * (2 * math.pi / 40)  # head 1 looks 30 to 50 tokens back, again and again
    inputs.keys[1, :, :2] = 8 * torch.stack([turns.cos(), turns.sin()], dim=1)
    back = turns - 40 * 2 * math.pi / 40 + 0.5
    inputs.queries[1, :, :2] = 8 * torch.stack([back.cos(), back.sin()], dim=1)
    search = SizeSearch(SizeSearch.Config(share=0.3, last_rows=32, sink_tokens=0, local_window=1))
    assert search.sparsify(inputs).cell_density().tolist() == [1.0, 1.0]
    (down, along) = search.found()[0]
    assert down[0] > 3 * down[1] and along[1] > 3 * along[0]
    assert all(vertical + slash <= 0.3 * 257 / 2 + 2 for vertical, slash in scaled(256, 256, 0.3))


def share_of(mass: Tensor, share: float, least: int = 0) -> set[int]:
    ranked = sorted(range(len(mass)), key=lambda at: (-float(mass[at]), at))
    taken: list[int] = []
    for at in ranked:
        if len(taken) >= least and sum(float(mass[t]) for t in taken) >= share * float(mass.sum()) * (1 - 1e-6):
            break
        taken.append(at)
    return {at for at in taken if mass[at] > 0}


def blocks_mask(inputs: AttentionInputs, chosen: list[dict[int, set[int]]], block: int) -> Tensor:
    """Cells of chosen key blocks per query block, the first real block and the queries' own always in."""
    cells = torch.zeros(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens, dtype=torch.bool)
    history = inputs.total_tokens - inputs.new_tokens
    for head, by_row in enumerate(chosen):
        for row, at in enumerate(inputs.columns.tolist()):
            rows = range(row // block * block, min((row // block + 1) * block, inputs.new_tokens))
            blocks = by_row.get(row // block, set()) | {first_of(inputs, head) // block}
            blocks |= {(history + other) // block for other in rows}
            for column in range(at + 1):
                cells[head, row, column] = column // block in blocks
    return cells


def pooled_attention(inputs: AttentionInputs, head: int, rows: range, block: int) -> Tensor:
    """Softmax of the mean of some rows over the means of the key blocks they see."""
    query = inputs.queries[head, list(rows)].double().mean(0)
    last, first = int(inputs.columns[rows[-1]]), first_of(inputs, head)
    count = -(-inputs.total_tokens // block)
    logits = torch.full((count,), -math.inf, dtype=torch.float64)
    for number in range(count):
        columns = [c for c in range(number * block, min((number + 1) * block, inputs.total_tokens)) if c >= first]
        if columns and number * block <= last:
            logits[number] = inputs.keys[head // inputs.group, columns].double().mean(0) @ query * inputs.scaling
    return logits.softmax(-1)


def row_blocks(inputs: AttentionInputs, block: int) -> list[range]:
    return [range(s, min(s + block, inputs.new_tokens)) for s in range(0, inputs.new_tokens, block)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("top_p", "least", "most"), [(0.5, 1, None), (0.8, 3, None), (0.95, 1, 2)])
def test_topk_blocks_takes_the_blocks_that_hold_the_share(
    call: dict[str, Any], top_p: float, least: int, most: int | None
) -> None:
    inputs, block = make_inputs(**call), 8
    config = TopKBlocksPrefill.Config(top_p=top_p, block=block, least_blocks=least, most_blocks=most)
    chosen = []
    for head in range(inputs.queries.shape[0]):
        by_row = {}
        for number, rows in enumerate(row_blocks(inputs, block)):
            mass = pooled_attention(inputs, head, rows, block)
            taken = share_of(mass, top_p, least)
            by_row[number] = taken & share_of(mass, 0.0, most) if most else taken
        chosen.append(by_row)
    found = TopKBlocksPrefill(config).sparsify(inputs).to_mask()
    assert torch.equal(real(inputs, found), real(inputs, blocks_mask(inputs, chosen, block)))


def test_topk_blocks_keeps_blocks_whose_mean_does_not_speak_for_them() -> None:
    inputs = make_inputs(new_tokens=16, total_tokens=64, kv_heads=1, group=1, head_dim=8)
    inputs.keys[:] = torch.ones(8)
    inputs.keys[0, 16:24] = torch.eye(8)  # eight keys at right angles
    config = {"top_p": 0.01, "block": 8, "least_blocks": 1}
    plain = TopKBlocksPrefill(TopKBlocksPrefill.Config(**config)).sparsify(inputs)
    careful = TopKBlocksPrefill(TopKBlocksPrefill.Config(similarity=0.9, **config)).sparsify(inputs)
    assert isinstance(plain, BlockPattern) and isinstance(careful, BlockPattern)
    assert not plain.blocks[0, :, 2].any() and careful.blocks[0, :, 2].all()
    assert torch.equal(careful.blocks[0, :, 3], plain.blocks[0, :, 3])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("stride", "threshold"), [(4, 0.6), (2, 0.9), (8, 0.3)])
def test_xattention_takes_the_blocks_that_hold_the_share(call: dict[str, Any], stride: int, threshold: float) -> None:
    inputs, block = make_inputs(**call), 8
    chosen = []
    for head in range(inputs.queries.shape[0]):
        mass = antidiagonals(inputs, head, stride, block)
        chosen.append({number: share_of(row, threshold) for number, row in enumerate(mass)})
    policy = XAttentionPrefill(XAttentionPrefill.Config(stride=stride, threshold=threshold, block=block))
    found = policy.sparsify(inputs).to_mask()
    assert torch.equal(real(inputs, found), real(inputs, blocks_mask(inputs, chosen, block)))


def antidiagonals(inputs: AttentionInputs, head: int, stride: int, block: int) -> Tensor:
    """Block masses of one head, square by square and cell by cell."""
    keys, first, total = inputs.keys[head // inputs.group].double(), first_of(inputs, head), inputs.total_tokens
    history, new = total - inputs.new_tokens, inputs.new_tokens
    mass = torch.zeros(-(-new // block), -(-total // block), dtype=torch.float64)
    for top in range(0, new, stride):
        last = history + min(top + stride, new) - 1
        logits = torch.full((-(-total // stride),), -math.inf, dtype=torch.float64)
        for number, left in enumerate(range(0, total, stride)):
            if left > last or min(left + stride, total) - 1 < first:
                continue
            products = 0.0
            for step in range(stride):
                row, column = top + step, left + stride - 1 - step
                if row < new and first <= column < total:
                    products += float(inputs.queries[head, row].double() @ keys[column])
            logits[number] = products * inputs.scaling / stride
        for number, share in enumerate(logits.softmax(-1).tolist()):
            mass[top // block, number * stride // block] += share
    return mass


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("tau", [0.0, 0.35, 1.0])
def test_flexprefill_picks_its_kind_of_pattern_and_its_share(call: dict[str, Any], tau: float) -> None:
    inputs, block, gamma = make_inputs(**call), 8, 0.6
    last = list(range(inputs.new_tokens - block, inputs.new_tokens))
    rows = probabilities(inputs, last)
    vertical, slash = line_masses(inputs, last)
    chosen, aware = [], []
    for head in range(inputs.queries.shape[0]):
        count = -(-inputs.total_tokens // block)
        true = torch.zeros(count, dtype=torch.float64)
        for column in range(inputs.total_tokens):
            true[column // block] += rows[head, :, column].sum() / block
        estimate = pooled_attention(inputs, head, range(last[0], last[-1] + 1), block)
        middle = (true + estimate) / 2
        distance = sum(
            float(p * math.log(p / m)) / 2
            for one in (true, estimate)
            for p, m in zip(one, middle, strict=True)
            if p > 0
        )
        aware.append(math.sqrt(max(distance, 0.0)) < tau)
        chosen.append(
            query_aware(inputs, head, gamma, block)
            if aware[-1]
            else line_blocks(inputs, vertical[head], slash[head], gamma, block)
        )
    assert any(aware) == (tau > 0) and (all(aware) or tau < 1)
    policy = FlexPrefillPrefill(FlexPrefillPrefill.Config(gamma=gamma, tau=tau, block=block, min_budget=3))
    found = policy.sparsify(inputs).to_mask()
    assert torch.equal(real(inputs, found), real(inputs, blocks_mask(inputs, chosen, block)))


def query_aware(inputs: AttentionInputs, head: int, gamma: float, block: int) -> dict[int, set[int]]:
    rows = [pooled_attention(inputs, head, each, block) for each in row_blocks(inputs, block)]
    whole = torch.stack(rows)
    taken = share_of(whole.flatten(), gamma)
    found = {
        number: {at - number * len(row) for at in taken if at // len(row) == number} for number, row in enumerate(rows)
    }
    return {number: found[number] | share_of(row, 0.0, 1) for number, row in enumerate(rows)}


def line_blocks(
    inputs: AttentionInputs, vertical: Tensor, slash: Tensor, gamma: float, block: int
) -> dict[int, set[int]]:
    downs, alongs = share_of(vertical, gamma, 3), share_of(slash, gamma, 3)
    found: dict[int, set[int]] = {}
    for row, at in enumerate(inputs.columns.tolist()):
        for column in range(at + 1):
            # A column touches a block wherever some row of the query block sees the block.
            if at - column in alongs:
                found.setdefault(row // block, set()).add(column // block)
        found.setdefault(row // block, set()).update(column // block for column in downs)
    return found


@given(data=st.data())
@settings(max_examples=40)
def test_blocks_of_lines_are_those_in_which_a_line_has_a_cell(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 40))
    new = data.draw(st.integers(1, total))
    block = data.draw(st.integers(1, 9))
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    slashes = torch.rand(2, total, generator=source) < 0.1
    found = blocks_of_lines(torch.zeros(2, total, dtype=torch.bool), slashes, new, block)
    wanted = torch.zeros_like(found)
    for row in range(new):
        for column in range(total - new + row + 1):
            wanted[:, row // block, column // block] |= slashes[:, total - new + row - column]
    assert torch.equal(found, wanted)


def flash_scores(inputs: AttentionInputs, head: int, rows: range, block: int) -> list[float]:
    """Score of each key block for some rows: the sum of powers over the rows that see all of it, cell by cell."""
    keys, first = inputs.keys[head // inputs.group].double(), first_of(inputs, head)
    found: dict[tuple[int, int], float] = {}
    for number in range(-(-inputs.total_tokens // block)):
        columns = [c for c in range(number * block, min((number + 1) * block, inputs.total_tokens)) if c >= first]
        if columns:
            mean = keys[columns].sum(0) / len(columns)
            for row in rows:
                if (number + 1) * block - 1 <= int(inputs.columns[row]):
                    found[number, row] = float(inputs.queries[head, row].double() @ mean) * inputs.scaling
    largest = max(found.values(), default=0.0)
    scores = [0.0] * -(-inputs.total_tokens // block)
    for (number, _), logit in found.items():
        scores[number] += math.exp(logit - largest)
    return scores


@pytest.mark.parametrize("call", [*CALLS, {"new_tokens": 3, "total_tokens": 5}])
@pytest.mark.parametrize(("threshold", "sinks", "window", "last"), [(0.18, 0, 1, 0), (0.6, 9, 16, 3), (1.0, 8, 20, 9)])
def test_flashprefill_takes_the_blocks_within_a_threshold_of_the_best(
    call: dict[str, Any], threshold: float, sinks: int, window: int, last: int
) -> None:
    inputs, block = make_inputs(**call), 8
    history, parts = inputs.total_tokens - inputs.new_tokens, row_blocks(inputs, 8)
    wanted = torch.zeros(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens, dtype=torch.bool)
    for head in range(len(wanted)):
        first = first_of(inputs, head)
        for number, rows in enumerate(parts):
            scores = flash_scores(inputs, head, rows, block)
            chosen = {at for at, score in enumerate(scores) if score > 0 and score >= threshold * max(scores)}
            chosen |= {column // block for column in range(first, first + sinks)}
            own = [(history + row) // block for row in rows]
            reach = (history + rows[0] - (math.ceil(window / block) - 1) * block) // block
            chosen |= set(range(max(reach, 0), own[-1] + 1))
            if number >= len(parts) - math.ceil(last / block):
                chosen = set(range(len(scores)))
            for row in rows:
                for column in range(int(inputs.columns[row]) + 1):
                    wanted[head, row, column] = column // block in chosen
    config = FlashPrefillPrefill.Config(
        threshold=threshold, block=block, sink_tokens=sinks, local_window=window, last_rows=last
    )
    found = FlashPrefillPrefill(config).sparsify(inputs)
    assert torch.equal(real(inputs, found.to_mask()), real(inputs, wanted))
    if last:  # the last rows of a turn are in its last chunk
        early = FlashPrefillPrefill(config).sparsify(make_inputs(**call, final=False))
        assert (early.cell_density() <= found.cell_density()).all()


@pytest.mark.parametrize("call", CALLS)
def test_sample_attention_takes_the_columns_that_hold_the_share(call: dict[str, Any]) -> None:
    inputs = make_inputs(**call)
    config = SampleAttentionPrefill.Config(alpha=0.7, sample_share=0.2, local_share=0.1, sink_tokens=1)
    count = math.ceil(inputs.new_tokens * 0.2)
    rows = [(step + 1) * inputs.new_tokens // count - 1 for step in range(count)]
    assert rows[-1] == inputs.new_tokens - 1
    vertical, _ = line_masses(inputs, rows)
    heads = range(inputs.queries.shape[0])
    downs = [share_of(vertical[head], 0.7) | {first_of(inputs, head)} for head in heads]
    window = set(range(math.ceil(inputs.total_tokens * 0.1)))
    found = SampleAttentionPrefill(config).sparsify(inputs).to_mask()
    assert torch.equal(real(inputs, found), real(inputs, lines_mask(inputs, downs, [window for _ in heads])))


@pytest.mark.parametrize("call", CALLS)
def test_tri_shape_is_an_a_shape_whose_last_rows_are_whole(call: dict[str, Any]) -> None:
    inputs = make_inputs(**call)
    config = TriShapePrefill.Config(sink_tokens=2, local_window=5, last_rows=6)
    heads = range(inputs.queries.shape[0])
    sinks = [set(range(first_of(inputs, head), first_of(inputs, head) + 2)) for head in heads]
    wanted = lines_mask(inputs, sinks, [set(range(5)) for _ in heads])
    wanted[:, -6:] = torch.arange(inputs.total_tokens) <= inputs.columns[-6:, None]
    pattern = TriShapePrefill(config).sparsify(inputs)
    assert torch.equal(real(inputs, pattern.to_mask()), real(inputs, wanted))
    early = make_inputs(**call, final=False)  # the last rows of a turn are in its last chunk
    assert TriShapePrefill(config).sparsify(early).cell_density().max() < pattern.cell_density().min()


def test_lines_counted_apart_stop_short_of_what_they_promise() -> None:
    """The ablation's point: cells on two lines are paid for twice, so the union holds less than alpha."""
    inputs = make_inputs(new_tokens=200, total_tokens=300, kv_heads=2, group=2, structured=True)
    common = {
        "alpha": 0.9,
        "cost": "length",
        "sampling": "uniform",
        "sink_tokens": 1,
        "local_window": 1,
        "dense_above": 1.0,
    }
    joint = LoopServePrefill(LoopServePrefill.Config(**common)).sparsify(inputs)
    apart = LoopServePrefill(LoopServePrefill.Config(overlap=False, **common)).sparsify(inputs)
    rows = torch.arange(200)
    whole = inputs.row_attention(rows).probabilities
    assert (joint.coverage(whole, inputs.columns) > apart.coverage(whole, inputs.columns) + 0.02).all()
    assert isinstance(apart, LinePattern)


def test_lines_counted_apart_follow_their_definition() -> None:
    inputs = make_inputs(new_tokens=12, total_tokens=30)
    vertical, slash = line_masses(inputs, list(range(12)))
    forced = torch.zeros(2, 4, 30, dtype=torch.bool)
    forced[1, :, 0] = True
    downs, alongs = lines_counted_apart(vertical, slash, 12, 0.6, (forced[0], forced[1]))
    for head in range(4):
        mass = torch.cat([vertical[head], slash[head]])
        length = [12 - max(0, line - 18) for line in range(30)] * 2
        ranked = sorted(range(60), key=lambda at: (at != 30, -float(mass[at]) / length[at], at))
        taken, total = set(), 0.0
        for at in ranked:
            if total >= 0.6 * 12 and at != 30:
                break
            taken.add(at)
            total += float(mass[at])
        assert taken == set(torch.cat([downs[head], alongs[head]]).nonzero().flatten().tolist())


def test_static_lines_of_the_first_turn_serve_all_later_ones() -> None:
    policy = StaticLinesPrefill(StaticLinesPrefill.Config(alpha=0.5, sample_rows=8, sink_tokens=1, local_window=2))
    first, later = (
        make_inputs(new_tokens=40, total_tokens=40),
        make_inputs(new_tokens=20, total_tokens=66, seed=9, turn=1),
    )
    chosen = policy.sparsify(first)
    with unchanged(later):
        object.__setattr__(later, "state", first.state)
        kept = policy.sparsify(later)
    assert isinstance(chosen, LinePattern) and isinstance(kept, LinePattern)
    assert torch.equal(kept.verticals[:, :40], chosen.verticals) and not kept.verticals[:, 40:].any()
    assert torch.equal(kept.slashes[:, :40], chosen.slashes) and not kept.slashes[:, 40:].any()
    assert not torch.equal(
        policy.sparsify(make_inputs(new_tokens=20, total_tokens=66, seed=9, turn=1)).to_mask(), kept.to_mask()
    )


def test_static_lines_follow_the_session_through_undo_and_fork() -> None:
    spec = {"policy": "static_lines", "alpha": 0.5, "sample_rows": 8, "sink_tokens": 1, "local_window": 2}
    served = engine("llama", spec, {"policy": "full"})
    session = served.session()
    talk = answers(served, session)
    next(talk)
    other = session.fork()
    kept = [each.states["prefill:0"] for each in (session, other)]
    assert kept[0] is not kept[1] and kept[0].keys() == kept[1].keys() == {0, 1, 2}
    next(talk)
    assert all(torch.equal(kept[0][layer][0], kept[1][layer][0]) for layer in range(3))
    session.undo()
    session.undo()
    assert session.states["prefill:0"] == {}


def test_static_lines_can_be_given(tmp_path: Path) -> None:
    file = tmp_path / "lines.json"
    lines = [{"verticals": [1, 5, 900], "slashes": [3]}, {"verticals": [], "slashes": [0, 7]}, {}, {"verticals": [2]}]
    file.write_text(json.dumps({"layers": {"0": lines}}))
    policy = StaticLinesPrefill(StaticLinesPrefill.Config(lines=str(file), sink_tokens=0, local_window=1))
    inputs = make_inputs(new_tokens=10, total_tokens=25, turn=2)
    downs = [set(each.get("verticals", [])) for each in lines]
    alongs = [set(each.get("slashes", [])) for each in lines]
    assert torch.equal(policy.sparsify(inputs).to_mask(), lines_mask(inputs, downs, alongs))
    assert policy.refuses(inputs.layer) is None
    assert "has no lines for it" in str(policy.refuses(make_inputs(layer=1).layer))
    assert "lines for 4 heads" in str(policy.refuses(make_inputs(group=1).layer))


def test_the_largest_share_is_the_fewest_entries() -> None:
    mass = torch.tensor([[0.1, 0.4, 0.0, 0.4, 0.1]])
    assert largest_share(mass, 0.4).tolist() == [[False, True, False, False, False]]  # equal: the lowest first
    assert largest_share(mass, 0.81).sum() == 3
    assert largest_share(mass, 1.0).tolist() == [[True, True, False, True, True]]
    assert largest_share(mass, 0.1, 2).tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("policy", SPARSIFIERS, ids=label)
@settings(max_examples=15)
@given(inputs=attention_inputs(max_tokens=60))
def test_any_call_gives_a_causal_pattern_that_attends_as_its_mask_says(policy: Any, inputs: AttentionInputs) -> None:
    sparsifier: PrefillSparsifier = small(policy)
    with unchanged(inputs):
        pattern = sparsifier.sparsify(inputs)
    assert_pattern(pattern, inputs)
    mask = real(inputs, pattern.to_mask())
    output, _ = pattern.attend(
        inputs.queries, inputs.keys, inputs.values, scaling=inputs.scaling, first_valid=inputs.first_valid
    )
    keys, values = (each.repeat_interleave(inputs.group, dim=0) for each in (inputs.keys, inputs.values))
    logits = (inputs.queries @ keys.transpose(1, 2) * inputs.scaling).masked_fill(~mask, -math.inf)
    assert torch.allclose(output, logits.softmax(-1) @ values, atol=1e-4)
    for density in (pattern.cell_density(), pattern.tile_density()):
        assert density.shape == (inputs.queries.shape[0],) and (density <= 1 + 1e-6).all() and (density > 0).all()
