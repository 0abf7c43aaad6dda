"""Read the benchmark published with the paper: TreeAILab/Multi-turn_Long-context_Benchmark_for_LLMs, from the hub or a folder.

Two names of its schema are documented, for a turn of config ``multi-turn_QA``: ``prompt_back`` and
``question_at_back``; the question is a suffix of the prompt. Configs and other fields are detected at run time, never
guessed, and listed by ``report()``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from loopserve.bench.metrics import METRICS
from loopserve.bench.samples import AskedTurn, BrokenSample, Places, Position, Sample, TaskOptions, several
from loopserve.bench.tasks.longbench import SETS
from loopserve.bench.tasks.source import Rows, folder_rows, gold_answers, hub_rows
from loopserve.core.errors import ConfigError, did_you_mean

_ENDINGS: Mapping[str, Position] = {
    "back": "end",
    "end": "end",
    "middle": "middle",
    "mid": "middle",
    "front": "begin",
    "begin": "begin",
    "beginning": "begin",
    "start": "begin",
}
_PROMPT = re.compile(rf"prompt(?:_at)?_({'|'.join(_ENDINGS)})")
_QUESTION = re.compile(rf"question(?:_at)?_({'|'.join(_ENDINGS)})")
_ANSWERS = re.compile(r"(gold_|ground_|reference_)?(answers?|truths?|targets?|labels?|references?|outputs?)")
_SET = re.compile(r"(data_?set|task|sub_?set|source)(_name)?")
_CLASSES = re.compile(r"(all_)?classes")
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


class FieldNames(BaseModel):
    """Hold the names that the user gives; missing ones are detected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: dict[Position, str] = Field(
        default_factory=dict, description="Field with a turn's whole text, by position."
    )
    question: dict[Position, str] = Field(default_factory=dict, description="Field with the question, by position.")
    answers: str | None = Field(None, description="Field with the gold answer, or the list of them.")
    data_set: str | None = Field(None, description="Field with the name of the LongBench set, in the turn or the row.")
    classes: str | None = Field(None, description="Field with the class names, in the turn or the row.")


@dataclass(frozen=True)
class Fields:
    """Hold the fields in use, and all fields that were present."""

    prompt: Mapping[Position, str]
    question: Mapping[Position, str]
    answers: str
    data_set: str | None
    classes: str | None
    of_row: tuple[str, ...]
    of_turn: tuple[str, ...]

    def report(self) -> list[str]:
        """Return the result, one line per field, for logs and manifests."""
        used = [f"{position}: {self.prompt[position]} with {self.question[position]}" for position in self.prompt]
        return [
            f"fields of a row: {', '.join(self.of_row)}",
            f"fields of a turn: {', '.join(self.of_turn)}",
            f"question positions: {'; '.join(used)}",
            f"answers: {self.answers}",
            f"name of the set: {self.data_set or 'no such field'}",
            f"classes: {self.classes or 'no such field'}",
        ]


def find_fields(
    row: Mapping[str, Any], turn: Mapping[str, Any], wanted: Iterable[Position], given: FieldNames
) -> Fields:
    """Return the fields to read, from those of a row and of a turn.

    Raises ConfigError, with their names, where there is not exactly one candidate.
    """
    both = {**row, **turn}
    prompts = {position: given.prompt.get(position) or _only(turn, _PROMPT, position, "prompt") for position in wanted}
    questions = {
        position: given.question.get(position) or _only(turn, _QUESTION, position, "question") for position in wanted
    }
    answers = given.answers or _one(turn, _ANSWERS, "answers", required=True)
    assert answers is not None
    return Fields(
        prompts,
        questions,
        answers,
        given.data_set or _one(both, _SET, "data_set", required=False),
        given.classes or _one(both, _CLASSES, "classes", required=False),
        tuple(row),
        tuple(turn),
    )


def _only(turn: Mapping[str, Any], pattern: re.Pattern[str], position: Position, what: str) -> str:
    matches = [name for name in turn if (match := pattern.fullmatch(name)) and _ENDINGS[match.group(1)] == position]
    if len(matches) != 1:
        raise ConfigError(
            f"published set: {_how_many(matches)} for a {what} at the {position}; a turn has {', '.join(turn)}; "
            f"name it: fields: {{{what}: {{{position}: FIELD}}}}"
        )
    return matches[0]


def _one(fields: Mapping[str, Any], pattern: re.Pattern[str], what: str, *, required: bool) -> str | None:
    matches = [name for name in fields if pattern.fullmatch(name)]
    if len(matches) == 1:
        return matches[0]
    if matches or required:
        there = ", ".join(fields)
        raise ConfigError(
            f"published set: {_how_many(matches)} for {what}; there are {there}; name it: fields: {{{what}: FIELD}}"
        )
    return None


def _how_many(matches: list[str]) -> str:
    return "no field" if not matches else f"more than one field ({', '.join(matches)})"


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
