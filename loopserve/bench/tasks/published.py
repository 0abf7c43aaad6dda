"""Read the benchmark published with the paper: TreeAILab/Multi-turn_Long-context_Benchmark_for_LLMs, from the hub or a folder.

Little of its schema is documented, so configs and fields are detected at run time and listed by ``report()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from pydantic import Field

from loopserve.bench.metrics import METRICS
from loopserve.bench.samples import AskedTurn, BrokenSample, Position, Sample
from loopserve.bench.tasks.longbench_sets import SETS
from loopserve.bench.tasks.options import Places, TaskOptions, several
from loopserve.bench.tasks.published_fields import FieldNames, Fields, find_fields
from loopserve.bench.tasks.published_source import Rows, folder_rows, hub_rows
from loopserve.bench.tasks.source import gold_answers
from loopserve.core.errors import ConfigError, did_you_mean

VERSION = "1"
REPOSITORY = "TreeAILab/Multi-turn_Long-context_Benchmark_for_LLMs"
_LONGEST = {
    "qa_f1": 128,
    "rouge_l": 512,
    "classification": 64,
    "exact_match": 64,
    "edit_similarity": 64,
}  # as LongBench
_TURNS = "multi_turn"  # the documented list of turns
_LOOKED_AT = 50  # rows


class PublishedOptions(TaskOptions):
    """The published benchmark, one of its configs."""

    source: str = Field("hub", min_length=1, description="hub, shipped (a few rows of our own), or a folder.")
    repository: str = Field(REPOSITORY, description="On the hub.")
    revision: str | None = Field(None, description="Of the repository; the newest by default.")
    config: str = Field("multi-turn_QA", description="The documented one; a wrong name lists those that were found.")
    split: str = Field("train", description="The documented one.")
    position: Places = Field("end", description="Where the question stands; `end` is the documented field.")
    fields: FieldNames = Field(default_factory=FieldNames, description="Fields whose names cannot be found out.")
    metric: str | None = Field(None, description="For rows that do not name their LongBench set.")
    max_new_tokens: int | None = Field(None, gt=0, description="By default LongBench's longest for the metric or set.")


class PublishedTask:
    """Make samples of one config. Raises ConfigError at once, with the command that downloads the set, if it is not present."""

    def __init__(self, kind: str, options: PublishedOptions) -> None:
        self.name = options.name or kind
        self.options = options
        if options.metric is not None and options.metric not in METRICS:
            raise ConfigError(f"{self.name}: unknown metric {options.metric!r}{did_you_mean(options.metric, METRICS)}")
        self._rows = _open(options)
        self.version = f"{VERSION}+{self._rows.digest}"
        self.fields = self._find_fields()
        # Without the name of a set in the rows, only the documented name of the config determines the metric.
        self._metric_of_config = options.metric or ("qa_f1" if "QA" in options.config else None)
        if self._metric_of_config is None and self.fields.data_set is None:
            raise ConfigError(
                f"{self.name}: rows do not name a LongBench set, so how answers are scored is not known; give metric: "
                f"one of {', '.join(METRICS)}"
            )

    def report(self) -> list[str]:
        """Return the configs and fields that were detected, the fields in use, and the metrics."""
        configs = f"configs: {', '.join(self._rows.configs)}; in use: {self.options.config} ({len(self._rows)} rows)"
        others = f"{self._metric_of_config or 'none'} for others"
        scored = self.options.metric or (f"by set, {others}" if self.fields.data_set else self._metric_of_config)
        return [configs, *self.fields.report(), f"metric: {scored}"]

    def samples(self, limit: int | None, seed: int) -> Iterator[Sample | BrokenSample]:
        """Yield rows in an order drawn by the seed (the file may be sorted by set), each at all positions.

        A broken row counts as one.
        """
        order = list(range(len(self._rows)))
        Random(f"{self.options.config}-{seed}").shuffle(order)
        for count, (number, position) in enumerate(product(order, several(self.options.position))):
            if limit is not None and count >= limit:
                return
            row = self._rows.row(number)
            name = f"{row.id}-{position}"
            if row.data is None:
                yield BrokenSample(name, self.name, row.why)
                continue
            try:
                yield Sample(name, self.name, self._turns(row.data, position))
            except _Unusable as why:
                yield BrokenSample(name, self.name, str(why))

    def _find_fields(self) -> Fields:
        """Return all fields of the first rows together, as one row may lack some. Raises ConfigError if a name is ambiguous."""
        of_row: dict[str, Any] = {}
        of_turn: dict[str, Any] = {}
        for number in range(min(_LOOKED_AT, len(self._rows))):
            data = self._rows.row(number).data or {}
            turns = data.get(_TURNS)
            for turn in turns if isinstance(turns, list) else []:
                if isinstance(turn, Mapping):
                    of_row |= data
                    of_turn |= turn
        if not of_turn:
            raise ConfigError(f"{self.name}: of the first {_LOOKED_AT} rows none has a list {_TURNS!r} of turns")
        return find_fields(of_row, of_turn, several(self.options.position), self.options.fields)

    def _turns(self, row: Mapping[str, Any], position: Position) -> tuple[AskedTurn, ...]:
        turns = row.get(_TURNS)
        if not isinstance(turns, list) or not turns:
            raise _Unusable(f"the row has no list {_TURNS!r} of turns (it has {', '.join(row) or 'nothing'})")
        asked = []
        for number, turn in enumerate(turns, 1):
            try:
                asked.append(self._turn(row, turn, position))
            except _Unusable as why:
                raise _Unusable(f"turn {number}: {why}") from why
        return tuple(asked)

    def _turn(self, row: Mapping[str, Any], turn: Any, position: Position) -> AskedTurn:
        if not isinstance(turn, Mapping):
            raise _Unusable(f"it is no object but {type(turn).__name__}")
        prompt = _text(turn, self.fields.prompt[position])
        question = _text(turn, self.fields.question[position])
        if question not in prompt or (position == "end" and not prompt.endswith(question)):
            where = "a suffix" if position == "end" else "a part"
            raise _Unusable(f"{self.fields.question[position]} is not {where} of {self.fields.prompt[position]}")
        answers = _answers(turn, self.fields.answers)
        before = prompt.rfind(question) if position == "end" else prompt.find(question)
        labels: dict[str, Any] = {"distance": 0, "words": len(prompt.split()), "question_at": before / len(prompt)}
        metric, longest = self._metric(row, turn, labels)
        return AskedTurn(prompt, question, answers, position, metric, self.options.max_new_tokens or longest, labels)

    def _metric(self, row: Mapping[str, Any], turn: Mapping[str, Any], labels: dict[str, Any]) -> tuple[str, int]:
        """Return metric and answer length of a turn; store the metric's parameters in the labels."""
        own = self.fields.data_set and turn.get(self.fields.data_set, row.get(self.fields.data_set))
        known = SETS.get(str(own))
        if own:
            labels["set"] = own
        metric = self.options.metric or (known.metric if known else self._metric_of_config)
        if metric is None:
            raise _Unusable(f"its set {own!r} is not known, so it needs the option metric")
        if metric == "classification":
            classes = self.fields.classes and turn.get(self.fields.classes, row.get(self.fields.classes))
            if not classes:
                raise _Unusable("it names no classes, without which an answer cannot be scored")
            labels["classes"] = list(classes)
        if known and known.first_line:
            labels["first_line"] = True
        return metric, known.max_new_tokens if known and known.metric == metric else _LONGEST[metric]


class _Unusable(Exception):
    """Report why a row cannot be asked."""


def _open(options: PublishedOptions) -> Rows:
    if options.source == "hub":
        return hub_rows(options.repository, options.revision, options.config, options.split)
    shipped = Path(str(files("loopserve.bench"))) / "data" / "published"
    folder = shipped if options.source == "shipped" else Path(options.source).expanduser()
    return folder_rows(folder, options.config, options.split, options.repository)


def _text(turn: Mapping[str, Any], field: str) -> str:
    if field not in turn:
        raise _Unusable(f"the field {field} is missing")
    value = turn[field]
    if not isinstance(value, str) or not value.strip():
        raise _Unusable(f"{field} is empty or no text")
    return value


def _answers(turn: Mapping[str, Any], field: str) -> tuple[str, ...]:
    if field not in turn:
        raise _Unusable(f"the field {field} is missing")
    try:
        return gold_answers(turn[field])
    except ValueError as why:
        raise _Unusable(str(why)) from why
