"""Define tasks: dialogues whose turns have a question, gold answers and a metric, and the options that every task shares;
fit a dialogue into a model's window.

An option that takes one value or several stands for one case per value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from loopserve.core.errors import InputError

Position = Literal["begin", "middle", "end"]
POSITIONS: tuple[Position, ...] = ("begin", "middle", "end")
OneOrMore = int | tuple[int, ...]
Places = Position | tuple[Position, ...]
Value = TypeVar("Value", int, Position)
Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]
TEMPLATE_TOKENS = 16
"""Tokens reserved for the additions of a chat template to a turn."""


@dataclass(frozen=True)
class AskedTurn:
    """Hold one turn. Gold history holds ``answers[0]``; a turn without answers is acknowledged and not scored.

    text: the user's whole message. question: the part of it that asks, for tables and heat maps. metric: a name in
    ``loopserve.bench.metrics.METRICS``. labels: values that results are grouped by, besides turn and position (keys
    asked, distances to the turns that stated them), and parameters of the metric (``classes``).
    """

    text: str
    question: str
    answers: tuple[str, ...]
    position: Position | None
    metric: str
    max_new_tokens: int
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Hold one dialogue. The id is unique within its task and equal in every run."""

    id: str
    task: str
    turns: tuple[AskedTurn, ...]


@dataclass(frozen=True)
class BrokenSample:
    """Hold a row that cannot be asked, and the reason in one line. It is reported and counted, and the run continues."""

    id: str
    task: str
    why: str


class Task(Protocol):
    """Define a source of samples. ``version`` changes whenever the same seed gives other samples."""

    name: str
    version: str

    def samples(self, limit: int | None, seed: int) -> Iterator[Sample | BrokenSample]:
        """Yield at most ``limit`` dialogues: equal ones for equal seeds, in the same order."""
        ...


class TaskOptions(BaseModel):
    """Hold the options of a task, as a suite file gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(
        None, min_length=1, description="Name in results; the task's own by default. For a task that a suite has twice."
    )


def several(value: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    """Return one value or several as a sequence."""
    return value if isinstance(value, tuple) else (value,)


def fit(
    sample: Sample, encode: Encode, decode: Decode, max_tokens: int, *, template_tokens: int = TEMPLATE_TOKENS
) -> tuple[Sample, int]:
    """Return the sample cut to at most ``max_tokens`` for the whole dialogue, and the number of tokens cut.

    encode, decode: text to token ids and back, without special tokens. Every turn counts its text, the longer of gold
    answer and ``max_new_tokens``, and ``template_tokens``. The longest contexts are cut first, to a common length. A
    question is never cut: the text before and after it loses its own middle, both the same share. A turn that was cut
    has the label ``truncated``. Raises InputError if questions and answers alone do not fit.
    """
    parts = [_around(turn) for turn in sample.turns]
    fixed = sum(_fixed(turn, encode) + template_tokens for turn in sample.turns)
    lengths = [_context(turn, encode) for turn in sample.turns]
    if fixed + sum(lengths) <= max_tokens:
        return sample, 0
    # Cutting makes new token borders, so a cut text may need a token or two more than the limit: the limit then decreases.
    slack = 0
    while (available := max_tokens - fixed - slack) >= 0:
        limit = _common_limit(lengths, available)
        turns = [
            turn if length <= limit else _cut(turn, part, limit, encode, decode)
            for turn, part, length in zip(sample.turns, parts, lengths, strict=True)
        ]
        counts = [_context(turn, encode) for turn in turns]
        excess = fixed + sum(counts) - max_tokens
        if excess <= 0:
            truncated = [max(0, length - count) for length, count in zip(lengths, counts, strict=True)]
            marked = tuple(_mark(turn, cut) for turn, cut in zip(turns, truncated, strict=True))
            return replace(sample, turns=marked), sum(truncated)
        slack += excess
    raise InputError(f"questions and answers alone need {fixed} tokens, the window has {max_tokens}")


def _around(turn: AskedTurn) -> tuple[str, str, str]:
    """Return the text before the question, the question, and the text after it."""
    at = -1
    if turn.question:
        at = turn.text.rfind(turn.question) if turn.position == "end" else turn.text.find(turn.question)
    if at < 0:
        return turn.text, "", ""
    stop = at + len(turn.question)
    return turn.text[:at], turn.text[at:stop], turn.text[stop:]


def _context(turn: AskedTurn, encode: Encode) -> int:
    """Return the tokens of a turn besides its question."""
    return len(encode(turn.text)) - len(encode(turn.question))


def _fixed(turn: AskedTurn, encode: Encode) -> int:
    gold = len(encode(turn.answers[0])) if turn.answers else 0
    return len(encode(turn.question)) + max(gold, turn.max_new_tokens)


def _common_limit(lengths: Sequence[int], available: int) -> int:
    """Return the greatest length such that all texts, cut to it, fit the available tokens."""
    left, limit = available, 0
    ordered = sorted(lengths)
    for index, length in enumerate(ordered):
        limit = left // (len(ordered) - index)
        if length > limit:
            return limit
        left -= length
    return ordered[-1]


def _cut(turn: AskedTurn, parts: tuple[str, str, str], limit: int, encode: Encode, decode: Decode) -> AskedTurn:
    before, question, after = parts
    first, last = len(encode(before)), len(encode(after))
    kept = limit * first // max(first + last, 1)
    text = _without_middle(before, kept, encode, decode) + question
    return replace(turn, text=text + _without_middle(after, limit - kept, encode, decode))


def _without_middle(text: str, tokens: int, encode: Encode, decode: Decode) -> str:
    ids = encode(text)
    if len(ids) <= tokens:
        return text
    head = tokens // 2
    start, stop = decode(ids[:head]) if head else "", decode(ids[len(ids) - (tokens - head) :]) if tokens else ""
    # Tokenizers may drop the spaces at the ends of a decoded piece; without them the question would join a word.
    lead, trail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    return lead + (start.strip() + " " + stop.strip()).strip() + trail


def _mark(turn: AskedTurn, cut: int) -> AskedTurn:
    labels: Mapping[str, Any] = {**turn.labels, "truncated": cut}
    return replace(turn, labels=labels) if cut else turn
