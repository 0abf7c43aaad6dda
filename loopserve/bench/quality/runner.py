"""Run the dialogues of a suite under several stacks: one dialogue after another, all stacks on each. From Python::

    run = run_suite(
        load_suite("synthetic-small"),      # quality.suite; or a QualitySuite made in Python
        model="demo",                       # or a pair (model, tokenizer) that is loaded already
        stacks=["dense", "loopserve"],      # names, files, dicts or PolicyStacks; the suite's own by default
        attended=[0.05, 0.1],               # shares of dense's KV pairs; () leaves every stack its own budget
        limit=8, seed=0,                    # dialogues of each task
        directory=Path("runs/mine"),        # None keeps the records in memory
        progress=lambda step: print(step),  # a Step after each dialogue and stack
    )
    run.records                             # one dict per dialogue, stack and turn: quality.records

``Examiner`` asks samples of any ``Task`` under any contestants and yields the records as they are produced.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loopserve.api import Engine, StackLike, load_stack
from loopserve.bench import metrics
from loopserve.bench.budget import budget_of
from loopserve.bench.quality.conversation import Answered, Conversation, Distributions, History
from loopserve.bench.quality.records import (
    FILE,
    Key,
    Kind,
    Record,
    RecordFile,
    Run,
    claim,
    error_record,
    is_asked_again,
    key_of,
    read_manifest,
    turn_record,
)
from loopserve.bench.quality.suite import Contestant, Found, QualitySuite, contestants, suite_digest, suite_tasks
from loopserve.bench.rows import provenance
from loopserve.bench.samples import AskedTurn, BrokenSample, Sample, Task
from loopserve.bench.tasks import fit
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.errors import ConfigError, Fault, InputError, LoopServeError, PolicyFault
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.digest import model_digest
from loopserve.models.loading import load

_ACKNOWLEDGEMENT = "ok ."  # the answer to a turn without a question, in either kind of history
_NOBODY = {"stack": "", "family": "", "digest": ""}  # the stack name in records of broken samples


@dataclass(frozen=True)
class Settings:
    """Hold the options of a run.

    limit: dialogues of each task. history: answers that later turns build on. agreement: compare with dense, which then
    takes part. coverage: measure realised coverage.
    """

    limit: int | None = None
    seed: int = 0
    history: History = "gold"
    agreement: bool = True
    coverage: bool = False


@dataclass(frozen=True)
class Step:
    """Report progress: dialogues asked, counted per stack, of those that this start has to ask; and the last one."""

    done: int
    total: int
    task: str
    sample: str
    stack: str


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class _Dense:
    """Hold dense attention's answer in one turn, and its distributions along the gold answer."""

    answered: Answered
    distributions: Distributions


class Examiner:
    """Ask samples under each contestant of a model. A contestant that the model cannot run is recorded once and left out."""

    def __init__(self, engine: Engine, lineup: Sequence[Contestant], settings: Settings) -> None:
        """Prepare a run. engine: model and tokenizer; its own stack is not used. lineup: dense is put first, and added
        for agreement.
        """
        self.engine = engine
        self.settings = settings
        self.lineup = _dense_first(lineup, settings.agreement)
        self.refused: list[Record] = []
        self._able: list[Contestant] = []
        for each in self.lineup:
            try:
                self._tokens(each.stack)
                self._able.append(each)
            except ConfigError as error:
                self.refused.append(error_record(each.fields(), "", "", "refused", _one_line(error)))

    def run(
        self, tasks: Sequence[Task], done: Container[Key] = frozenset(), progress: Progress | None = None
    ) -> Iterator[list[Record]]:
        """Yield the records of each sample and contestant, all turns together, as soon as they are complete.

        done: records of earlier starts, which are not asked again.
        """
        for record in self.refused:
            if key_of(record) not in done:
                yield [record]
        total = self._check(tasks, done)
        count = 0
        for task in tasks:
            for sample in self._samples(task):
                for records in self._ask(sample, done):
                    yield records
                    count += 1
                    if progress is not None:
                        progress(Step(count, total, task.name, sample.id, records[0]["stack"]))

    def _check(self, tasks: Sequence[Task], done: Container[Key]) -> int:
        """Return the number of dialogues to ask. Raises ConfigError for a metric that cannot be computed."""
        waiting = 0
        used: set[str] = set()
        for task in tasks:
            for sample in self._samples(task):
                waiting += len(self._waiting(sample, done))
                if isinstance(sample, Sample):
                    used |= {turn.metric for turn in sample.turns if turn.answers}
        metrics.check(sorted(used))
        return waiting

    def _samples(self, task: Task) -> Iterator[Sample | BrokenSample]:
        return task.samples(self.settings.limit, self.settings.seed)

    def _waiting(self, sample: Sample | BrokenSample, done: Container[Key]) -> list[Contestant | None]:
        """Return the contestants still to be asked; None stands for the one record of a broken sample."""
        if isinstance(sample, BrokenSample):
            return [None] if ("", "", sample.task, sample.id) not in done else []
        return [each for each in self._able if (each.name, each.digest, sample.task, sample.id) not in done]

    def _ask(self, sample: Sample | BrokenSample, done: Container[Key]) -> Iterator[list[Record]]:
        waiting = self._waiting(sample, done)
        if isinstance(sample, BrokenSample):
            if waiting:
                yield [error_record(_NOBODY, sample.task, sample.id, "broken", sample.why)]
            return
        dense: list[_Dense] | None = None
        for each in self._able if waiting else ():
            compared = self.settings.agreement and each is self.lineup[0]
            if each not in waiting and not compared:
                continue
            try:
                fitted = self._fit(sample)
                stack = each.fitted(*self._lengths(fitted))
                answers = self._answers(fitted, stack)
                records = [
                    {**self._score(turn, answered), "agreement": _agreement(answered, dense[number] if dense else None)}
                    for number, (turn, answered) in enumerate(zip(fitted.turns, answers, strict=True))
                ]
            except Exception as error:  # errors of a plugin's policy, a kernel or a full memory must not end the run
                if each in waiting:
                    kind: Kind = "slow" if isinstance(error, PolicyFault) and error.fault is Fault.SLOW else "failed"
                    yield [error_record(each.fields(), sample.task, sample.id, kind, _one_line(error))]
                continue
            if compared:
                dense = [_Dense(answered, Distributions.of(answered.predictions)) for answered in answers]
            if each in waiting:
                where = {**each.fields(), "task": sample.task, "sample": sample.id}
                yield [
                    {**where, "turn": number, "turns": len(records), "budget": budget_of(stack), **record}
                    for number, record in enumerate(records)
                ]

    def _answers(self, sample: Sample, stack: PolicyStack) -> list[Answered]:
        talk = Conversation(self._tokens(stack), self.engine.tokenizer, self.engine.stop_ids)
        answers = []
        for turn in sample.turns:
            gold = _gold(turn) if self.settings.history == "gold" or not turn.answers else None
            answers.append(talk.ask(turn.text, gold, turn.max_new_tokens, generate=bool(turn.answers)))
        return answers

    def _tokens(self, stack: PolicyStack) -> TokenEngine:
        served = self.engine.token_engine
        return TokenEngine(
            served.model, stack, chunk_tokens=served.chunk_tokens, measure_coverage=self.settings.coverage
        )

    def _fit(self, sample: Sample) -> Sample:
        limit = self.engine.token_engine.model.max_positions
        if limit is None:
            return sample
        tokenizer = self.engine.tokenizer
        return fit(sample, tokenizer.answer_tokens, tokenizer.decode, limit - 1)[0]

    def _lengths(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Return the tokens of the conversation at each scored answer, and of each gold answer, without those of the template."""
        count = self.engine.tokenizer.answer_tokens
        lengths, answers, length = [], [], 0
        for turn in sample.turns:
            length += len(count(turn.text))
            if turn.answers:
                lengths.append(length)
                answers.append(len(count(turn.answers[0])))
            length += len(count(_gold(turn)))
        if not lengths:
            raise InputError("no turn of the dialogue has an answer to score")
        return lengths, answers

    def _score(self, turn: AskedTurn, answered: Answered) -> Record:
        record = turn_record(turn, answered)
        if not turn.answers:
            return {**record, "score": None, "parts": None}
        score = metrics.score(turn.metric, answered.text, turn.answers, turn.labels)
        parts = metrics.part_scores(answered.text, turn.answers[0]) if turn.metric == "exact_match" else None
        return {**record, "score": score, "parts": parts and [int(right) for right in parts]}


def run_suite(
    suite: QualitySuite,
    *,
    model: str | tuple[Any, Any] = "demo",
    stacks: Sequence[StackLike] = (),
    attended: Sequence[float] | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    history: History | None = None,
    agreement: bool = True,
    coverage: bool | None = None,
    directory: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Run:
    """Run a suite. Arguments that are not given come from the suite. With a directory, ``resume`` continues a killed run.

    Raises ConfigError before anything is asked for unknown stacks, tasks and metrics, and for a directory of another
    run.
    """
    lineup = contestants(
        [load_stack(each) for each in stacks or suite.stacks], suite.attended if attended is None else attended
    )
    asked = suite_tasks(suite, tasks)
    settings = Settings(
        limit if limit is not None else suite.limit,
        seed,
        history or suite.history,
        agreement,
        suite.coverage if coverage is None else coverage,
    )
    loaded, tokenizer = load(model, device=device, dtype=dtype) if isinstance(model, str) else model
    examiner = Examiner(Engine(loaded, tokenizer, "dense"), lineup, settings)
    identity = {
        "suite": {
            "name": suite.name,
            "digest": suite_digest(suite, asked),
            "tasks": [task.name for task in asked],
            "found": {task.name: task.report() for task in asked if isinstance(task, Found)},
        },
        "model": {
            "name": model if isinstance(model, str) else type(loaded).__name__,
            "digest": model_digest(loaded, tokenizer),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": loaded.device.type,
        },
        "lineup": [each.name for each in examiner.lineup],
        "stacks": {each.name: each.described() for each in examiner.lineup},
        "settings": asdict(settings),
        "metrics": metrics.versions(),
    }
    session = provenance(str(loaded.device))
    if directory is None:
        return Run(identity, [session], [record for records in examiner.run(asked, (), progress) for record in records])
    claim(directory, identity, session, resume=resume)
    file = RecordFile(directory / FILE)
    done = {key_of(record) for record in file.records if not is_asked_again(record)}
    try:
        for records in examiner.run(asked, done, progress):
            file.append(records)
    finally:
        file.close()
    return Run(identity, read_manifest(directory)["sessions"], file.records)


def _dense_first(lineup: Sequence[Contestant], agreement: bool) -> list[Contestant]:
    dense = [each for each in lineup if each.stack.is_dense]
    if agreement and not dense:
        dense = contestants([load_stack("dense")])
        if any(each.name == dense[0].name for each in lineup):
            raise ConfigError(
                "a stack called 'dense' is not dense: give it another 'name', as dense takes part to compare with"
            )
    return [*dense[:1], *(each for each in lineup if each not in dense[:1])]


def _gold(turn: AskedTurn) -> str:
    return turn.answers[0] if turn.answers else _ACKNOWLEDGEMENT


def _agreement(answered: Answered, dense: _Dense | None) -> Record | None:
    """Return whether the first token and the answer equal dense's, and mean and maximum KL to dense in nats on the gold answer."""
    if dense is None or not answered.tokens:
        return None
    found: Record = {
        "first_token": answered.tokens[0] == dense.answered.tokens[0],
        "answer": answered.text == dense.answered.text,
    }
    if answered.predictions:
        divergences = dense.distributions.divergences(answered.predictions)
        found |= {"kl": sum(divergences) / len(divergences), "kl_most": max(divergences)}
    return found


def _one_line(error: Exception) -> str:
    message = "; ".join(line for line in str(error).splitlines() if line.strip())
    return message if isinstance(error, LoopServeError) else f"{type(error).__name__}: {message.partition('; ')[0]}"
