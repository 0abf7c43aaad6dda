"""Recombine LongBench into dialogues of several turns, each a context with a question at its begin, middle or end.

Construction (docs/benchmark_tasks.md): the items of one set are shuffled by the seed and taken in groups, one item per
turn. Each group is asked at every position. In the cross-turn variant (``distance``) a turn asks about the context of
an earlier turn, and its own context is a distractor.

Twelve English sets are recombined. Metrics, answer lengths and the first-line rule are LongBench's. The wording is
ours, because LongBench's prompts put an instruction before and after the context, and a question at the begin must not
be restated at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import Field, model_validator

from loopserve.bench.samples import (
    POSITIONS,
    AskedTurn,
    BrokenSample,
    OneOrMore,
    Places,
    Position,
    Sample,
    TaskOptions,
    several,
)
from loopserve.bench.tasks.source import DataFile, Row, data_files, digest, gold_answers, open_zip, read_rows
from loopserve.core.errors import ConfigError
from loopserve.core.stack.config import mistake

Kind = Literal["question answering", "summarisation", "few-shot"]
WHERE: Mapping[Position, str] = {"begin": "that follows", "middle": "that stands around this request", "end": "above"}
EARLIER = "in my message number {number}"
_CUE = re.compile(r"\s*(Type|Answer|Summary):\s*$")
_BRIEF = "Give the answer only, as briefly as you can."
_NEAR = 0.2  # maximum distance of a border from half of the context, as a share, before smaller parts are tried
_PARAGRAPH = re.compile(r"\n\s*\n")
_LINE = re.compile(r"\n")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\s+")
VERSION = "1"
REPOSITORY = "THUDM/LongBench"
ARCHIVE = "data.zip"
DOWNLOAD = "hf download {repository} data.zip --repo-type dataset --local-dir {folder}"


@dataclass(frozen=True)
class LongBenchSet:
    """Hold one set. ``request`` is the turn's request; {where} names the context's place, {input} the item's own question."""

    name: str
    kind: Kind
    context: str
    """Kind of the context, for a turn that only contains it."""
    request: str
    metric: str
    max_new_tokens: int
    example: str | None = None
    """Pattern at which an example of a few-shot context begins; a question never splits an example."""

    @property
    def first_line(self) -> bool:
        """Return whether only the first line is scored: in few-shot sets models continue with examples of their own."""
        return self.kind == "few-shot"

    def question(self, asked: str, where: str) -> str:
        """Return the request with an item's question, without a cue at its end (``Answer:``), since the context may follow it."""
        return self.request.format(where=where, input=_CUE.sub("", asked)).strip()


def _answer(name: str, context: str, tokens: int, extra: str = "") -> LongBenchSet:
    request = f"Answer a question about the {context} {{where}}. {_BRIEF}{extra}\nQuestion: {{input}}"
    return LongBenchSet(name, "question answering", context, request, "qa_f1", tokens)


def _summary(name: str, context: str, request: str) -> LongBenchSet:
    return LongBenchSet(name, "summarisation", context, request, "rouge_l", 512)


_YES_NO = " Answer a yes-or-no question with yes or no, and say unanswerable if the article does not answer it."

SETS: Mapping[str, LongBenchSet] = {
    each.name: each
    for each in (
        _answer("narrativeqa", "story", 128),
        _answer("qasper", "article", 128, _YES_NO),
        _answer("multifieldqa_en", "text", 64),
        _answer("hotpotqa", "collection of passages", 32),
        _answer("2wikimqa", "collection of passages", 32),
        _answer("musique", "collection of passages", 32),
        _summary("gov_report", "government report", "Write a summary of the government report {where}, one page long."),
        _summary(
            "qmsum",
            "meeting transcript",
            "Answer a question about the meeting transcript {where}, in one or a few sentences.\nQuestion: {input}",
        ),
        _summary("multi_news", "news collection", "Write a summary of the news collection {where}, one page long."),
        LongBenchSet(
            "trec",
            "few-shot",
            "list of classified questions",
            "Say of which type a question is, as in the list of classified questions {where}. Give the type only.\n{input}",
            "classification",
            64,
            r"^Question:",
        ),
        LongBenchSet(
            "samsum",
            "few-shot",
            "list of summarised dialogues",
            "Summarise a dialogue, as in the list of summarised dialogues {where}.\n{input}",
            "rouge_l",
            128,
            r"^Dialogue:",
        ),
        LongBenchSet(
            "triviaqa",
            "few-shot",
            "list of passages with questions and answers",
            "Answer the question about a passage, as in the list of passages with questions and answers {where}. "
            "Give the answer only.\n{input}",
            "qa_f1",
            32,
            r"^Passage:",
        ),
    )
}


def place(context: str, question: str, position: Position, boundary: str | None = None) -> str:
    """Return the turn's text. In the middle, the question is at the border nearest to half of the context.

    boundary: a pattern; borders are at its matches (before an example of a few-shot context). Otherwise borders are
    between paragraphs or, where none is within a fifth of the context from half, between lines, sentences, words. An
    empty context gives the question alone.
    """
    if not context:
        return question
    if position == "begin":
        return f"{question}\n\n{context}"
    if position == "end":
        return f"{context}\n\n{question}"
    at = _middle(context, boundary)
    return f"{context[:at].rstrip()}\n\n{question}\n\n{context[at:].lstrip()}"


def _middle(context: str, boundary: str | None) -> int:
    """Return the index of the border to use, never at an end unless there is no border inside."""
    patterns = [re.compile(boundary, re.MULTILINE)] if boundary else [_PARAGRAPH, _LINE, _SENTENCE, _WORD]
    nearest: list[int] = []
    for pattern in patterns:
        borders = [match.start() for match in pattern.finditer(context) if 0 < match.start() < len(context)]
        nearest += [min(borders, key=lambda at: abs(2 * at - len(context)))] if borders else []
        if nearest and abs(2 * nearest[-1] - len(context)) <= 2 * _NEAR * len(context):
            break
    return nearest[-1] if nearest else len(context) // 2


class LongBenchOptions(TaskOptions):
    """One of LongBench's sets, recombined into dialogues."""

    source: str = Field("hub", min_length=1, description="hub, shipped (a few items of our own), or a folder.")
    repository: str = Field(REPOSITORY, description="On the hub; only data.zip is read, no script is run.")
    revision: str | None = Field(None, description="Of the repository; the newest by default.")
    turns: int = Field(3, ge=1, description="Items of a dialogue, one a turn.")
    position: Places = Field(POSITIONS, description="Where the question stands in its turn's text.")
    distance: OneOrMore = Field(
        0, description="How many turns before the question its context is given; above 0 is the cross-turn variant."
    )

    @model_validator(mode="after")
    def _possible(self) -> LongBenchOptions:
        for distance in several(self.distance):
            if not 0 <= distance < self.turns:
                raise mistake(f"distance must be from 0 to turns - 1 ({self.turns - 1}), got {distance}")
        return self


@dataclass(frozen=True)
class Item:
    """Hold one verified row of LongBench."""

    id: str
    asked: str
    context: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


class LongBenchTask:
    """Make samples of one set. Raises ConfigError at once, with the command that downloads it, if the set is not present."""

    def __init__(self, kind: str, options: LongBenchOptions) -> None:
        self.name = options.name or kind
        self.options = options
        self.set = SETS[kind.removeprefix("longbench-")]
        self._files = _locate(self.set.name, options)
        self.version = f"{VERSION}+{digest(self._files)}"

    def samples(self, limit: int | None, seed: int) -> Iterator[Sample | BrokenSample]:
        """Yield broken rows first (they do not count towards the limit), then every group at all positions and distances."""
        items, broken = self._items()
        yield from broken
        turns = self.options.turns
        if len(items) < turns:
            yield BrokenSample("dialogues", self.name, f"{len(items)} usable rows are too few for {turns} turns")
            return
        Random(f"{self.set.name}-{seed}").shuffle(items)
        groups = (items[at : at + turns] for at in range(0, len(items) - turns + 1, turns))
        everything = product(groups, several(self.options.distance), several(self.options.position))
        for count, (group, distance, position) in enumerate(everything):
            if limit is not None and count >= limit:
                return
            asked = tuple(self._turn(group, index, distance, position) for index in range(turns))
            index = count // (len(several(self.options.distance)) * len(several(self.options.position)))
            yield Sample(f"{index:04d}-{position}-distance{distance}", self.name, asked)

    def _turn(self, group: Sequence[Item], index: int, distance: int, position: Position) -> AskedTurn:
        own, about = group[index], index - distance
        words = len(own.context.split())
        if about < 0:
            text = f"Here is a {self.set.context}. I will ask about it in a later message.\n\n{own.context}"
            return AskedTurn(text, "", (), None, self.set.metric, 1, {"set": self.set.name, "words": words})
        item = group[about]
        where = WHERE[position] if not distance else EARLIER.format(number=about + 1)
        question = self.set.question(item.asked, where)
        labels: dict[str, Any] = {
            "set": self.set.name,
            "kind": self.set.kind,
            "item": item.id,
            "distance": distance,
            "words": words,
        }
        if item.classes:
            labels["classes"] = list(item.classes)
        if self.set.first_line:
            labels["first_line"] = True
        text = place(own.context, question, position, self.set.example)
        return AskedTurn(text, question, item.answers, position, self.set.metric, self.set.max_new_tokens, labels)

    def _items(self) -> tuple[list[Item], list[BrokenSample]]:
        items, broken = [], []
        for row in (row for file in self._files for row in read_rows(file)):
            checked = self._check(row)
            if isinstance(checked, Item):
                items.append(checked)
            else:
                broken.append(BrokenSample(row.id, self.name, checked))
        return items, broken

    def _check(self, row: Row) -> Item | str:
        """Return the row as an item, or the reason why it cannot be asked."""
        if row.data is None:
            return row.why
        data: Mapping[str, Any] = row.data
        missing = [field for field in ("context", "input", "answers") if field not in data]
        if missing:
            return f"the row lacks {', '.join(missing)} (it has {', '.join(sorted(data)) or 'nothing'})"
        context, asked = data["context"], data["input"]
        if not isinstance(context, str) or not context.strip():
            return "the context is empty or no text"
        if not isinstance(asked, str) or ("{input}" in self.set.request and not asked.strip()):
            return "the input (the question) is empty or no text"
        try:
            answers = gold_answers(data["answers"])
        except ValueError as why:
            return str(why)
        classes = data.get("all_classes") or []
        if self.set.metric == "classification" and not classes:
            return "all_classes is missing, without which an answer cannot be scored"
        return Item(str(data.get("_id") or row.id), asked, context, answers, tuple(map(str, classes)))


def _locate(name: str, options: LongBenchOptions) -> list[DataFile]:
    if options.source == "shipped":
        folder = Path(str(files("loopserve.bench"))) / "data" / "longbench"
        found = [path for path in data_files(folder) if path.stem == name]
        if not found:
            shipped = ", ".join(path.stem for path in data_files(folder))
            raise ConfigError(
                f"no items of {name!r} are shipped (known: {shipped}); give a folder or the hub as source"
            )
        return list(found)
    if options.source == "hub":
        return _in_zip(_from_hub(options), name, options, Path("longbench"))
    folder = Path(options.source).expanduser()
    for place_ in (folder, folder / "data", folder / name):
        if place_.is_dir():
            own = data_files(place_)
            found = own if place_.name == name else [path for path in own if path.stem == name]
            if found:
                return list(found)
    if (folder / ARCHIVE).is_file():
        return _in_zip(folder / ARCHIVE, name, options, folder)
    raise ConfigError(f"LongBench's set {name!r} is not in {folder}; get it with: {_command(options, folder)}")


def _in_zip(archive: Path, name: str, options: LongBenchOptions, folder: Path) -> list[DataFile]:
    root = open_zip(archive)
    for inside in (root / "data" / f"{name}.jsonl", root / f"{name}.jsonl"):
        if inside.is_file():
            return [inside]
    raise ConfigError(f"{archive} has no {name}.jsonl; get LongBench with: {_command(options, folder)}")


def _from_hub(options: LongBenchOptions) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(options.repository, ARCHIVE, repo_type="dataset", revision=options.revision))
    except (OSError, ValueError) as error:  # no network, no such repository or offline mode raise different errors
        command = _command(options, Path("longbench"))
        raise ConfigError(
            f"{options.repository} cannot be had from the hub; get it with: {command}, then give source: longbench"
        ) from error


def _command(options: LongBenchOptions, folder: Path) -> str:
    return DOWNLOAD.format(repository=options.repository, folder=folder)
