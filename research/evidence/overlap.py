"""Claim 2: which lines matter depends on the input; choices for two inputs overlap by less than half."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.bench.heads import Heads
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask
from loopserve.core.policy.patterns import LinePattern
from loopserve.kernels.select_lines import select_lines
from research.evidence.lines import chance, jaccard, row_coverage, softmax_rows
from research.evidence.recording import Recording, record
from research.evidence.tally import with_error
from research.evidence.units import Found, Row, Spec, Unit
from research.evidence.words import percent, table, verdict

NAME = "overlap"
ALPHA = 0.90
PAIRS = ("inputs", "turns", "halves")


def units(tokens: int, dialogues: int, model: str = "demo") -> list[Unit]:
    """One dialogue and its neighbour a unit."""
    return [
        Unit(
            NAME,
            {
                "kind": NAME,
                "label": f"dialogue {seed}",
                "model": model,
                "task": {"tokens": tokens, "turns": 3, "keys": 2, "position": "mixed"},
                "seed": 100 + 2 * seed,
            },
        )
        for seed in range(dialogues)
    ]


class _Side:
    """A block of rows of one head's layer with the lines that all its rows choose."""

    def __init__(self, heads: Heads, first_row: int = 0, rows: int | None = None) -> None:
        """The rows ``first_row`` to ``first_row + rows`` of a block; what they cannot see of it is cut away."""
        stop = heads.queries.shape[1] if rows is None else first_row + rows
        self.new = stop - first_row
        total = heads.history + stop
        cut = Heads(heads.queries[:, first_row:stop], heads.keys[:, :total], heads.values[:, :total], "")
        self.probabilities, self.columns = softmax_rows(cut)
        chosen = select_lines(self.probabilities, self.columns, self.new, alpha=ALPHA, cost="length")
        self.verticals, self.slashes = chosen.verticals, chosen.slashes
        self.own = float(chosen.coverage.mean())

    @property
    def total(self) -> int:
        return self.verticals.shape[1]


def measure(spec: Spec) -> Found:
    """For each pair of blocks: overlap (Jaccard) of verticals, slashes and both, what chance would give, and the share of the
    second block's mass that the first one's lines hold (``held``; its own lines hold ``own``); each a list by layer, mean
    over heads. Halves share their columns up to the first half's end.
    """
    task = RecallTask(**spec["task"])
    one, other = (record(spec["model"], task, HELD_OUT_SEED + spec["seed"] + more) for more in (0, 1))
    last = one.turns - 1
    found: Found = {}
    for layer in one.layers:
        sides = {
            "inputs": (_turn(one, layer, last), _turn(other, layer, last)),
            "turns": (_turn(one, layer, last - 1), _turn(one, layer, last)),
            "halves": _halves(one, layer, last),
        }
        for name, (first, second) in sides.items():
            for figure, value in _compared(first, second).items():
                found.setdefault(name, {}).setdefault(figure, []).append(round(value, 4))
    return found


def _turn(recording: Recording, layer: int, turn: int) -> _Side:
    return _Side(recording.block(layer, *recording.rows_of(turn)))


def _halves(recording: Recording, layer: int, turn: int) -> tuple[_Side, _Side]:
    heads = recording.block(layer, *recording.rows_of(turn))
    half = heads.queries.shape[1] // 2
    return _Side(heads, 0, half), _Side(heads, half, heads.queries.shape[1] - half)


def _compared(first: _Side, second: _Side) -> dict[str, float]:
    common = min(first.total, second.total)
    ours = [first.verticals[:, :common], first.slashes[:, :common]]
    theirs = [second.verticals[:, :common], second.slashes[:, :common]]
    both = [torch.cat(lines, dim=1) for lines in (ours, theirs)]
    lent = LinePattern(_fit(first.verticals, second.total), _fit(first.slashes, second.total), second.new)
    return {
        "verticals": float(jaccard(ours[0], theirs[0]).mean()),
        "slashes": float(jaccard(ours[1], theirs[1]).mean()),
        "both": float(jaccard(*both).mean()),
        "chance": float(chance(*both).mean()),
        "held": float(row_coverage(lent, second.probabilities, second.columns).mean()),
        "own": second.own,
    }


def _fit(lines: Tensor, total: int) -> Tensor:
    return pad(lines[:, :total], (0, max(0, total - lines.shape[1])))


_SAID = {
    "inputs": "two dialogues, last turns",
    "turns": "turns two and three of one dialogue",
    "halves": "halves of one turn",
}


def section(rows: Sequence[Row]) -> str:
    found = [row["found"] for row in rows]
    figures = ("verticals", "slashes", "both", "chance", "held", "own")
    by_layer = [
        [
            _SAID[pair],
            *(
                with_error([each[pair]["both"][layer] for each in found])
                for layer in range(len(found[0][pair]["both"]))
            ),
        ]
        for pair in PAIRS
    ]
    over = {pair: mean(_values(found, pair, "both")) for pair in PAIRS}
    held, own = (mean(_values(found, "inputs", name)) for name in ("held", "own"))
    return "\n\n".join(
        [
            f"Lines that hold {percent(ALPHA, 0)} of all rows' mass at the price of their length, nothing forced, "
            f"{len(found)} pairs of dialogues. Overlap is shared over "
            "all lines of two choices (Jaccard), by place for verticals and by offset for slashes; *by chance*: what "
            "random choices of these sizes share. *Held*: the share "
            "of the second block's mass that the first one's lines hold; its own hold *own*.",
            table(
                ["between", "verticals", "slashes", "both", "both, by chance", "held", "own"],
                [[_SAID[pair], *(with_error(_values(found, pair, name)) for name in figures)] for pair in PAIRS],
            ),
            "Both kinds, by layer:",
            table(["between", *(f"layer {layer}" for layer in range(len(by_layer[0]) - 1))], by_layer),
            verdict(
                over["inputs"] < 0.5,
                f"the lines of two inputs overlap by {percent(over['inputs'])}, those of two turns of a dialogue by "
                f"{percent(over['turns'])}, those of the halves of "
                f"one turn by {percent(over['halves'])}.",
            ),
            verdict(
                held < own - 0.02,
                f"lines of another input are a loss: they hold {percent(held)} of the mass where the input's own lines "
                f"hold {percent(own)}.",
            ),
        ]
    )


def _values(found: Sequence[Found], pair: str, name: str) -> list[float]:
    """A figure, mean over layers: one value per pair of dialogues."""
    return [mean(each[pair][name]) for each in found]
