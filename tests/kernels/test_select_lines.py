"""The greedy reaches its target, counts overlap out, and the fast one costs no more than the readable one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.choose_lines import choose_lines
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.select_lines import TILE, LineSelection, select_lines
from tests.kernels.cases import FAST, IMPLEMENTATIONS, make

FORMS = ("sinks", "local", "slashes", "verticals", "diffuse")


def rows_of_heads(new: int, total: int, sampled: int, seed: int, sharp: float = 1.5) -> tuple[Tensor, Tensor]:
    """Softmax rows ``[5, r, n]`` of heads that look like trained ones, one per form, and where the rows stand."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(new, generator=generator)[:sampled].sort().values
    columns = rows + total - new
    offsets = columns[:, None] - torch.arange(total)
    heads = []
    for form in FORMS:
        scores = torch.randn(len(rows), total, generator=generator) * (1.0 if form == "diffuse" else 0.5)
        if form != "diffuse":
            scores[:, :4] += 3.0
        if form in ("local", "slashes", "verticals"):
            scores += 5.0 * torch.exp(-offsets.clamp(min=0) / 8.0)
        if form == "slashes":
            for offset in torch.randint(0, max(total // 2, 1), (6,), generator=generator):
                scores += 6.0 * (offsets == offset)
        if form == "verticals":
            scores[:, torch.randperm(total, generator=generator)[: total // 30]] += 5.0
        heads.append((sharp * scores).masked_fill(offsets < 0, float("-inf")).softmax(-1))
    return torch.stack(heads), columns


def covered(selection: LineSelection, probabilities: Tensor, columns: Tensor) -> Tensor:
    """Mass of each sampled row on the union, from the mask: ``[Hq, r]``."""
    offsets = columns[:, None] - torch.arange(probabilities.shape[2])
    mask = selection.verticals[:, None] | selection.slashes[:, offsets.clamp(min=0)]
    return (probabilities * (mask & (offsets >= 0))).sum(-1)


def cost(selection: LineSelection, new: int, cost_of: str) -> Tensor:
    """Return the cost of a selection per head, counted cell by cell: ``[Hq]``."""
    total = selection.verticals.shape[1]
    every = torch.arange(total - new, total)
    if cost_of == "length":
        offsets = every[:, None] - torch.arange(total)
        cells = selection.verticals[:, None] | selection.slashes[:, offsets.clamp(min=0)]
        return (cells & (offsets >= 0)).sum((1, 2)).float()
    reached = torch.zeros(len(selection.slashes), total + TILE - 1, dtype=torch.bool)
    for head, offset in selection.slashes.nonzero().tolist():
        reached[head, offset : offset + TILE] = True
    lengths = (new - (torch.arange(1 - TILE, total) - (total - new)).clamp(min=0)) / new
    return (reached * lengths).sum(1) + (selection.verticals * lengths[TILE - 1 :]).sum(1)


@pytest.mark.parametrize("cost_of", ["length", "tile"])
@pytest.mark.parametrize(("new", "total"), [(60, 60), (200, 300), (128, 700)])
def test_the_fast_greedy_costs_at_most_two_percent_more(cost_of: str, new: int, total: int) -> None:
    for seed in range(3):
        probabilities, columns = rows_of_heads(new, total, 48, seed)
        for alpha in (0.8, 0.95):
            with backend.use("reference"):
                slow = select_lines(probabilities, columns, new, alpha=alpha, cost=cost_of)
            assert (slow.coverage >= alpha - 1e-5).all()
            for name in FAST:
                with backend.use(name):
                    fast = select_lines(probabilities, columns, new, alpha=alpha, cost=cost_of)
                most = 1.02 if name == "torch" else 1.001  # the compiled greedy is the same greedy
                assert (fast.coverage >= alpha - 1e-5).all()
                assert fast.cost.sum() <= most * slow.cost.sum()
                # One line more or less is more than 2 % of a short list of lines.
                assert (fast.cost <= most * slow.cost + (new if cost_of == "length" else 1.0)).all()


@pytest.mark.parametrize("cost_of", ["length", "tile"])
def test_costs_are_counted_truly(cost_of: str) -> None:
    for new, total in [(1, 1), (1, 70), (64, 64), (90, 200)]:
        probabilities, columns = rows_of_heads(new, total, 16, seed=new)
        for name in IMPLEMENTATIONS:
            with backend.use(name):
                selection = select_lines(probabilities, columns, new, alpha=0.9, cost=cost_of)
            torch.testing.assert_close(selection.cost, cost(selection, new, cost_of))


def test_the_greedy_by_hand() -> None:
    """One sink column and one far diagonal: both kinds of line, the heavier first, nothing else."""
    columns = torch.tensor([4, 5, 6, 7])
    probabilities = torch.zeros(1, 4, 8)
    probabilities[0, :, 0] = 0.6
    probabilities[0, torch.arange(4), columns - 3] = 0.4
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            one = select_lines(probabilities, columns, 4, alpha=0.5)
            two = select_lines(probabilities, columns, 4, alpha=1.0)
        assert one.verticals[0].nonzero().tolist() == [[0]] and not one.slashes.any()
        assert two.verticals[0].nonzero().tolist() == [[0]] and two.slashes[0].nonzero().tolist() == [[3]]
        assert one.cost.tolist() == [4.0] and two.cost.tolist() == [8.0]
        torch.testing.assert_close(two.row_coverage, torch.ones(1, 4))


def test_of_equals_a_vertical_and_the_lower_index_win() -> None:
    probabilities, columns = torch.eye(4)[None], torch.arange(4)
    probabilities[0, 1:] = 0
    with backend.use("reference"):
        assert select_lines(probabilities, columns, 4, alpha=1.0).verticals[0].tolist() == [True, False, False, False]


def test_rows_that_attend_to_nothing_ask_for_nothing() -> None:
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            selection = select_lines(torch.zeros(2, 3, 9), torch.tensor([4, 6, 8]), 5, alpha=0.9, row_floor=0.5)
        assert not selection.verticals.any() and not selection.slashes.any() and (selection.coverage == 1).all()


@given(
    st.sampled_from([(1, 1), (1, 40), (7, 7), (63, 111), (30, 200)]),
    st.floats(0.0, 1.0),
    st.sampled_from(["length", "tile"]),
    st.sampled_from(IMPLEMENTATIONS),
    st.integers(0, 100),
)
@settings(max_examples=60)
def test_coverage_is_reached_and_reported(
    shape: tuple[int, int], alpha: float, cost_of: str, implementation: str, seed: int
) -> None:
    probabilities, columns = rows_of_heads(*shape, 16, seed)
    with backend.use(implementation):
        selection = select_lines(probabilities, columns, shape[0], alpha=alpha, cost=cost_of)
    expected = covered(selection, probabilities, columns).mean(1)
    torch.testing.assert_close(selection.coverage, expected.to(selection.coverage.dtype), atol=1e-4, rtol=1e-4)
    assert (selection.coverage >= alpha - 1e-4).all()


@given(st.integers(0, 50), st.sampled_from(IMPLEMENTATIONS))
@settings(max_examples=20)
def test_more_coverage_never_takes_fewer_cells(seed: int, implementation: str) -> None:
    probabilities, columns = rows_of_heads(40, 90, 24, seed)
    before = torch.zeros(len(FORMS))
    for alpha in (0.3, 0.6, 0.8, 0.95, 1.0):
        with backend.use(implementation):
            selection = select_lines(probabilities, columns, 40, alpha=alpha)
        assert (selection.coverage >= before - 1e-5).all()
        before = selection.coverage
    torch.testing.assert_close(before, torch.ones_like(before), atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_row_reaches_its_floor(implementation: str) -> None:
    probabilities, columns = rows_of_heads(100, 200, 32, 0)
    with backend.use(implementation):
        mean_only = select_lines(probabilities, columns, 100, alpha=0.9)
        floored = select_lines(probabilities, columns, 100, alpha=0.9, row_floor=0.85)
    assert covered(mean_only, probabilities, columns).min() < 0.85
    assert covered(floored, probabilities, columns).min() >= 0.85 - 1e-4
    torch.testing.assert_close(floored.row_coverage, covered(floored, probabilities, columns), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heavy_rows_are_served_first(implementation: str) -> None:
    probabilities, columns = rows_of_heads(100, 200, 32, 0)
    weights = torch.ones(32)
    weights[5] = 200.0
    with backend.use(implementation):
        plain = select_lines(probabilities, columns, 100, alpha=0.7)
        heavy = select_lines(probabilities, columns, 100, alpha=0.7, row_weights=weights)
        by_head = select_lines(probabilities, columns, 100, alpha=0.7, row_weights=weights.expand(len(FORMS), -1))
    assert torch.equal(heavy.verticals, by_head.verticals)
    gained = covered(heavy, probabilities, columns)[:, 5] - covered(plain, probabilities, columns)[:, 5]
    assert gained[-1] > 0.05  # the diffuse head has to choose whom to serve


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forced_lines_are_in_and_count(implementation: str) -> None:
    probabilities, columns = rows_of_heads(50, 80, 16, 1)
    forced = torch.zeros(len(FORMS), 80, dtype=torch.bool)
    forced[:, [3, 40]] = True
    with backend.use(implementation):
        selection = select_lines(probabilities, columns, 50, alpha=0.0, forced_verticals=forced, forced_slashes=forced)
    assert torch.equal(selection.verticals, forced) and torch.equal(selection.slashes, forced)


@pytest.mark.parametrize("cost_of", ["length", "tile"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_head_that_would_cost_too_much_is_given_up(implementation: str, cost_of: str) -> None:
    probabilities, columns = rows_of_heads(200, 300, 32, 0)
    with backend.use(implementation):
        free = select_lines(probabilities, columns, 200, alpha=0.95, cost=cost_of)
        bound = float(free.cost.median()) * 1.2
        bounded = select_lines(probabilities, columns, 200, alpha=0.95, cost=cost_of, most_cost=bound)
    cheap, dear = free.cost <= bound / 1.1, free.cost > bound * 1.1
    assert cheap.any() and dear.any()
    assert (bounded.coverage[cheap] >= 0.95 - 1e-4).all() and (bounded.coverage[dear] < 0.95).all()
    assert (bounded.cost[dear] <= bound * 1.1).all()


WEIGHTS = (0.3, 0.01, 0.003, 0.001, 1e-4, 0.0)


@pytest.mark.parametrize("cost_of", ["length", "tile"])
@given(
    seed=st.integers(0, 50),
    shape=st.sampled_from([(40, 90), (60, 60), (100, 300)]),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
@settings(max_examples=15)
def test_a_smaller_least_weight_takes_more_up_to_the_target(
    cost_of: str, seed: int, shape: tuple[int, int], implementation: str
) -> None:
    probabilities, columns = rows_of_heads(*shape, 24, seed)
    exact = implementation != "torch"  # the same greedy stops later; rounds may take their lines in another order
    before = None
    for weight in WEIGHTS:
        with backend.use(implementation):
            found = select_lines(probabilities, columns, shape[0], alpha=0.97, cost=cost_of, least_weight=weight)
        expected = covered(found, probabilities, columns).mean(1)
        torch.testing.assert_close(found.coverage, expected.to(found.coverage.dtype), atol=1e-4, rtol=1e-4)
        if before is not None:
            assert (found.coverage >= before.coverage - (1e-5 if exact else 0.01)).all()
            if exact:
                assert not (before.verticals & ~found.verticals).any() and not (before.slashes & ~found.slashes).any()
        before = found
    assert before is not None and (before.coverage >= 0.97 - 1e-4).all()


@pytest.mark.parametrize("cost_of", ["length", "tile"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lines_that_are_left_out_hold_less_than_the_least_weight(implementation: str, cost_of: str) -> None:
    probabilities, columns = rows_of_heads(100, 200, 32, 3)
    generator = torch.Generator().manual_seed(3)
    row_weights = torch.rand(32, generator=generator) + 0.1
    least = 0.002
    options = {"cost": cost_of, "row_weights": row_weights}
    with backend.use(implementation):
        found = select_lines(probabilities, columns, 100, alpha=1.0, least_weight=least, **options)  # type: ignore[arg-type]
    assert (found.coverage < 1 - 1e-4).any() and found.verticals.any()
    taken = cost(found, 100, cost_of)
    offsets = columns[:, None] - torch.arange(200)
    inside = (found.verticals[:, None] | found.slashes[:, offsets.clamp(min=0)]) & (offsets >= 0)
    rate = least * float(row_weights.sum()) / (1 if cost_of == "tile" else 100)
    for head, left in (found.verticals.logical_not()).nonzero().tolist()[::17]:
        verticals = found.verticals.clone()
        verticals[head, left] = True
        added = float(cost(found._replace(verticals=verticals), 100, cost_of)[head] - taken[head])
        gained = float((probabilities[head, :, left] * ~inside[head, :, left]) @ row_weights)
        assert gained <= rate * added * (1 + 1e-3) + 1e-5


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("cost_of", ["length", "tile"])
def test_stopped_by_weight_the_fast_greedy_covers_as_much_per_cost(implementation: str, cost_of: str) -> None:
    for seed in range(3):
        probabilities, columns = rows_of_heads(200, 300, 48, seed)
        options = {"alpha": 0.999, "cost": cost_of, "least_weight": 0.002}
        with backend.use("reference"):
            slow = select_lines(probabilities, columns, 200, **options)  # type: ignore[arg-type]
        with backend.use(implementation):
            fast = select_lines(probabilities, columns, 200, **options)  # type: ignore[arg-type]
        if implementation == "cpu":  # the same greedy
            assert torch.equal(fast.verticals, slow.verticals) and torch.equal(fast.slashes, slow.slashes)
        assert (fast.coverage >= slow.coverage - 0.02).all()
        assert fast.cost.sum() <= 1.03 * slow.cost.sum()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_row_reaches_its_floor_whatever_its_lines_hold(implementation: str) -> None:
    probabilities, columns = rows_of_heads(100, 200, 32, 0)
    with backend.use(implementation):
        found = select_lines(probabilities, columns, 100, alpha=0.9, row_floor=0.7, least_weight=0.05)
    assert covered(found, probabilities, columns).min() >= 0.7 - 1e-4


@given(st.integers(0, 30), st.sampled_from([None, 0.8]), st.booleans())
@settings(max_examples=20)
def test_choosing_is_scoring_then_selecting(seed: int, floor: float | None, filler: bool) -> None:
    case = make(70, 130, dim=32, seed=seed, filler=filler)
    rows = torch.randperm(70, generator=case.generator)[:20].sort().values
    queries, columns = case.queries[:, rows], rows + 60
    options = {
        "alpha": 0.9,
        "cost": "tile",
        "row_floor": floor,
        "row_weights": torch.rand(20, generator=case.generator),
    }
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            scores = line_scores(queries, case.keys, columns, scaling=0.3, first_valid=case.first_valid)
            wanted = select_lines(scores.probabilities, columns, 70, **options)
            found = choose_lines(queries, case.keys, columns, 70, scaling=0.3, first_valid=case.first_valid, **options)
        torch.testing.assert_close(found.coverage, wanted.coverage, atol=2e-3, rtol=0)
        torch.testing.assert_close(found.cost.sum(), wanted.cost.sum(), atol=1.0, rtol=0.01)


def test_counting_overlap_matters() -> None:
    """Stopping at the sum of line masses, crossings counted twice, falls short of the target (paper.md 6.4)."""
    probabilities, columns = rows_of_heads(200, 300, 64, 0)
    selection = select_lines(probabilities, columns, 200, alpha=0.95)
    offsets = columns[:, None] - torch.arange(300)
    vertical = (probabilities * selection.verticals[:, None]).sum((1, 2))
    slash = (probabilities * (selection.slashes[:, offsets.clamp(min=0)] & (offsets >= 0))).sum((1, 2))
    union = covered(selection, probabilities, columns).sum(1)
    assert ((vertical + slash) > union * 1.02).any()


def test_random_rows_find_a_question_that_stands_first_and_last_rows_do_not() -> None:
    """The paper's argument in miniature: rows 0-63 look at their own keys, later rows at others."""
    new, total, front = 512, 1024, 64
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(total - new, total)[:, None] - torch.arange(total)
    scores = torch.randn(new, total, generator=generator) * 0.3
    wanted = {part: torch.randperm(400, generator=generator)[:12] for part in ("front", "rest")}
    scores[:front, wanted["front"]] += 7.0
    scores[front:, wanted["rest"]] += 7.0
    attention = scores.masked_fill(offsets < 0, float("-inf")).softmax(-1)[None]

    def front_coverage(rows: Tensor) -> float:
        columns = rows + total - new
        selection = select_lines(attention[:, rows], columns, new, alpha=0.9)
        every = torch.arange(new) + total - new
        return float(covered(selection, attention, every)[0, :front].mean())

    random = torch.randperm(new, generator=generator)[:64].sort().values
    assert front_coverage(random) > 0.6
    assert front_coverage(torch.arange(new - 64, new)) < 0.3


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 1.5},
        {"least_weight": -0.1},
        {"cost": "area"},
        {"new_tokens": 0},
        {"columns": torch.arange(3)},
        {"row_weights": -torch.ones(8)},
    ],
)
def test_nonsense_is_named(change: dict[str, object]) -> None:
    probabilities, columns = rows_of_heads(10, 20, 8, 0)
    options = {"columns": columns, "new_tokens": 10, "alpha": 0.9, **change}
    with pytest.raises(ValueError, match="select_lines"):
        select_lines(probabilities, options.pop("columns"), options.pop("new_tokens"), **options)  # type: ignore[arg-type]
