"""Make the tables of a run as text cells, and compare two stacks or runs on the same questions by turn.

A comparison gives paired score differences, confidence intervals and p-values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loopserve.bench.quality.records import Record, Run, turns
from loopserve.bench.quality.summary import chance, gather, group_of, interval, mean, standard_error, summarise
from loopserve.core.errors import ConfigError

Cell = Callable[[Record], str]
_NONE = "-"
GROUPS = ("task", "position", "turn")
"""Groupings of scores in every run."""
_LEVEL = 0.05
_ENOUGH = 6  # dialogues: with fewer, differences of equal sign in all of them have a higher p-value than this level
_GROUPS = ((), ("task",), ("position",), ("task", "position"), ("turn",))


@dataclass(frozen=True)
class Table:
    """Hold rows of text under columns; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def tables(run: Run, by: Sequence[str] = (), *, times: bool = True) -> list[Table]:
    """Return all tables of a run that are not empty. by: labels of the tasks to group scores by. times: include measured times.

    Times differ between two runs of the same settings.
    """
    asked = list(turns(run.records))
    found = [_answers(asked)] if asked else []
    for across in (*((group,) for group in GROUPS[:2]), GROUPS[:2], GROUPS[2:], *((label,) for label in by)):
        varies = all(len({group_of(record, name) for record in asked} - {None}) > 1 for name in across)
        if varies or (across[0] in by and asked):
            found.append(scores(asked, *across))
    if any(len(record["parts"] or ()) > 1 for record in asked):
        found.append(_parts(asked))
    if asked:
        found += [_prefill(asked), _decode(asked), *([_times(asked)] if times else [])]
    return [*found, problems(run)]


def scores(records: Sequence[Record], *across: str) -> Table:
    """Return scores of each stack (rows) by one or two groupings (columns), with standard errors."""
    groups = _ordered({tuple(group_of(record, name) for name in across) for record in records})
    cells = {
        (row["stack"], *(row[name] for name in across)): plus_minus(row["score"], row["score_se"])
        for row in summarise(records, "stack", *across)
    }
    columns = [" / ".join(_spoken(name, value) for name, value in zip(across, group, strict=True)) for group in groups]
    rows = [(stack, *(cells.get((stack, *group), _NONE) for group in groups)) for stack in _stacks(records)]
    return Table(f"Score by {' and '.join(across)}", ("stack", *columns), tuple(rows))


def problems(run: Run) -> Table:
    """Return counts of broken, failed and truncated samples, and of refused stacks."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for record in run.records:
        if "error" in record:
            counted[record["error"]["kind"], record["stack"] or "all", record["error"]["why"]] += 1
    cut = {(record["task"], record["sample"]) for record in turns(run.records) if record["labels"].get("truncated")}
    rows = [(kind, stack, str(count), why) for (kind, stack, why), count in counted.items()]
    if cut:
        rows.append(("cut", "all", str(len(cut)), "longer than the model's window: contexts were cut in the middle"))
    return Table("Problems", ("kind", "stack", "dialogues", "why"), tuple(rows), "" if rows else "None.")


def plus_minus(value: float | None, error: float | None) -> str:
    """Return a share in %, with its standard error."""
    return _NONE if value is None else f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _answers(records: Sequence[Record]) -> Table:
    columns: dict[str, Cell] = {
        "score": lambda row: plus_minus(row["score"], row["score_se"]),
        "same first token": lambda row: plus_minus(row["same_first_token"], row["same_first_token_se"]),
        "same answer": lambda row: plus_minus(row["same_answer"], row["same_answer_se"]),
        "KL to dense": lambda row: _nats(row["kl"], row["kl_se"]),
        "dialogues": lambda row: str(row["dialogues"]),
        "turns": lambda row: str(row["turns"]),
    }
    note = (
        "Scores and shares in %, ± bootstrap standard error by dialogue; over tasks, the mean of their means. KL: of the next-token "
        "distribution, mean over the tokens of the gold answers, in nats."
    )
    return _by_stack("Answers", records, columns, note)


def _parts(records: Sequence[Record]) -> Table:
    """Return the share of correct parts by their place in the answer."""
    most = max(len(record["parts"] or ()) for record in records)
    rows = []
    for stack in _stacks(records):
        cells = []
        for index in range(most):
            dialogues = gather((each for each in records if each["stack"] == stack), _part(index))
            cells.append(plus_minus(mean(dialogues), standard_error(dialogues)))
        rows.append((stack, *cells))
    columns = ("stack", *(f"part {index + 1}" for index in range(most)))
    return Table("Right parts by their place in the answer", columns, tuple(rows))


def _part(index: int) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        parts = record["parts"] or ()
        return float(parts[index]) if 1 < len(parts) > index else None

    return value


def _prefill(records: Sequence[Record]) -> Table:
    columns: dict[str, Cell] = {
        "cells": lambda row: _percent(row["prefill_cell_density"]),
        "tiles": lambda row: _percent(row["prefill_tile_density"]),
        "coverage, estimated": lambda row: _percent(row["coverage_estimated"]),
        "held-out": lambda row: _percent(row["coverage_held_out"]),
        "realised": lambda row: _percent(row["coverage_realised"]),
        "fall-backs to dense per turn": lambda row: _number(row["fallbacks"]),
    }
    return _by_stack("Prefill", records, columns, "Cells and tiles: computed, as shares of causal attention.")


def _decode(records: Sequence[Record]) -> Table:
    columns: dict[str, Cell] = {
        "pairs attended per step": lambda row: _number(row["attended_pairs"]),
        "of dense's": lambda row: _percent(row["attended_fraction"]),
        "KV read per token": lambda row: _bytes(row["kv_bytes_per_token"]),
        "of dense's read": lambda row: _percent(row["kv_share"]),
        "with observation": lambda row: _percent(row["kv_share_with_observation"]),
        "steps with a new selection": lambda row: _number(row["reselected_steps"]),
        "tokens compressed": lambda row: _percent(row["compressed_share"]),
        "store": lambda row: _bytes(row["store_bytes"]),
        "active set": lambda row: _bytes(row["active_bytes"]),
    }
    note = (
        "Pairs: per step and layer, summed over KV heads. KV read: keys, values and summaries, for attending and scoring; with "
        "observation: what is read before the first output too, spread over the answer."
    )
    return _by_stack("Decoding", records, columns, note)


def _times(records: Sequence[Record]) -> Table:
    rows = summarise(records, "stack", "turn")
    numbers = sorted({row["turn"] for row in rows})
    cells = {(row["stack"], row["turn"]): (_ms(row["ttft_ms"]), _ms(row["tpot_ms"])) for row in rows}
    columns = [f"{name}, turn {number + 1}" for name in ("TTFT", "TPOT") for number in numbers]
    body = [
        (stack, *(cells.get((stack, number), (_NONE, _NONE))[part] for part in (0, 1) for number in numbers))
        for stack in _stacks(records)
    ]
    return Table("Time (medians)", ("stack", *columns), tuple(body))


def _by_stack(title: str, records: Sequence[Record], columns: dict[str, Cell], note: str) -> Table:
    """Return a row per stack. Columns without any value are left out."""
    rows = [(row["stack"], *(cell(row) for cell in columns.values())) for row in summarise(records, "stack")]
    names = ("stack", *columns)
    kept = [at for at in range(len(names)) if any(row[at] != _NONE for row in rows)]
    return Table(title, tuple(names[at] for at in kept), tuple(tuple(row[at] for at in kept) for row in rows), note)


def _stacks(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record["stack"] for record in records))


def _ordered(groups: set[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Return the values in order: numbers ascending, positions as they occur in a text."""
    rank = {"begin": 0, "middle": 1, "end": 2}

    def key(group: tuple[object, ...]) -> list[tuple[int, float, str]]:
        return [
            (value is None, rank.get(str(value), float(value) if isinstance(value, int | float) else 0), str(value))
            for value in group
        ]

    return sorted(groups, key=key)


def _spoken(name: str, value: object) -> str:
    if name == "turn" and isinstance(value, int):
        return f"turn {value + 1}"
    if name in ("task", "position"):
        return _NONE if value is None else str(value)
    return f"{name} {_NONE if value is None else value}"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1%}"


def _nats(value: float | None, error: float | None) -> str:
    return _NONE if value is None else f"{value:.2g}" + ("" if error is None else f" ± {error:.1g}")


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _ms(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.1f} ms"


def _bytes(value: float | None) -> str:
    return (
        _NONE if value is None else f"{value / 1024:,.1f} KiB" if value < 1 << 20 else f"{value / (1 << 20):,.1f} MiB"
    )


@dataclass(frozen=True)
class Difference:
    """Hold the difference (b - a) of one group of turns. low, high: 95 % interval by dialogue, None for one dialogue.

    chance: p-value of a sign-flip test by dialogue.
    """

    stack: str  # or "a against b"
    group: str
    dialogues: int
    turns: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    chance: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def compare_stacks(run: Run, a: str, b: str) -> list[Difference]:
    """Compare two stacks of one run."""
    return _differences(f"{b} - {a}", run.of_stack(a), run.of_stack(b))


def compare_runs(a: Run, b: Run) -> list[Difference]:
    """Compare each stack that took part in both runs. Raises ConfigError if they share no stack or no question."""
    shared = [name for name in a.stacks if name in b.stacks]
    if not shared:
        raise ConfigError(f"the runs have no stack in common: {', '.join(a.stacks)} and {', '.join(b.stacks)}")
    return [each for name in shared for each in _differences(name, a.of_stack(name), b.of_stack(name))]


def comparison_table(differences: Sequence[Difference]) -> Table:
    rows = tuple(
        (
            each.stack,
            each.group,
            plus_minus(each.a, None),
            plus_minus(each.b, None),
            f"{each.difference * 100:+.1f}",
            "-" if each.low is None or each.high is None else f"{each.low * 100:+.1f} to {each.high * 100:+.1f}",
            f"{each.chance:.3f}",
            f"{each.dialogues} / {each.turns}",
            each.verdict,
        )
        for each in differences
    )
    columns = ("stack", "turns", "A", "B", "B - A", "95 % interval", "chance", "dialogues / turns", "verdict")
    note = "Scores in %, paired turn by turn; intervals by bootstrap over dialogues, chance by flipping their signs."
    return Table("Differences", columns, rows, note)


def _differences(name: str, a: Iterable[Record], b: Iterable[Record]) -> list[Difference]:
    known = {_question(record): record for record in turns(a)}
    pairs = [(known[_question(record)], record) for record in turns(b) if _question(record) in known]
    if not pairs:
        raise ConfigError(f"{name}: no question was asked on both sides (other suites, seeds or limits?)")
    if any(ours["gold"] != theirs["gold"] for ours, theirs in pairs):
        raise ConfigError(f"{name}: the same samples have other gold answers on the two sides: their tasks differ")
    paired = [
        {**ours, "score": theirs["score"] - ours["score"], "a": ours["score"], "b": theirs["score"]}
        for ours, theirs in pairs
    ]
    found = []
    for grouping in _GROUPS:
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for record in paired:
            groups.setdefault(tuple(group_of(record, each) for each in grouping), []).append(record)
        if len(groups) > 1 or not grouping:
            found += [_difference(name, grouping, group, own) for group, own in groups.items()]
    return found


def _question(record: Record) -> tuple[str, str, int]:
    return record["task"], record["sample"], record["turn"]


def _difference(name: str, grouping: tuple[str, ...], group: tuple[Any, ...], records: Sequence[Record]) -> Difference:
    a, b = mean(gather(records, lambda record: record["a"])), mean(gather(records, lambda record: record["b"]))
    dialogues = gather(records, lambda record: record["score"])
    bounds = interval(dialogues)
    by_chance = chance(dialogues)
    count = sum(len(each) for each in dialogues.values())
    spoken = " / ".join(
        f"turn {value + 1}" if each == "turn" else str(value) for each, value in zip(grouping, group, strict=True)
    )
    return Difference(
        name,
        spoken or "all",
        count,
        len(records),
        a or 0.0,
        b or 0.0,
        mean(dialogues) or 0.0,
        bounds[0] if bounds else None,
        bounds[1] if bounds else None,
        by_chance,
        _verdict(
            mean(dialogues) or 0.0, bounds, by_chance, count, same=all(record["score"] == 0 for record in records)
        ),
    )


def _verdict(
    difference: float, bounds: tuple[float, float] | None, by_chance: float, dialogues: int, *, same: bool
) -> str:
    if same:
        return "no difference"
    if dialogues < _ENOUGH:
        return f"too few dialogues to tell (at least {_ENOUGH})"
    if by_chance > _LEVEL or (bounds is not None and bounds[0] <= 0 <= bounds[1]):
        return "noise"
    return "B is better" if difference > 0 else "A is better"
