"""Detect the fields of the published set. Two names are documented; the others are detected, reported, and never guessed.

Documented (a turn of config ``multi-turn_QA``): ``prompt_back`` and ``question_at_back``; the question is a suffix of
the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from loopserve.bench.samples import Position
from loopserve.core.errors import ConfigError

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
