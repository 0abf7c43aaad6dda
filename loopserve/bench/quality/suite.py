"""Read quality suites from YAML: ``loopserve/bench/suites/*.yaml`` or a user's file.

version: 1
name: mine
tasks:
  - {task: recall, tokens: 2048, dialogues: 8}      # a task's name and its options: loopserve bench ls
stacks: [dense, loopserve]                          # what --stack replaces
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from loopserve.bench.budget import budget_for, budget_of, uncounted_outputs_of, with_budget
from loopserve.bench.quality.conversation import History
from loopserve.bench.quality.records import Record
from loopserve.bench.samples import Task
from loopserve.bench.suite_files import SuiteKind, read_suite
from loopserve.bench.tasks import known_tasks, make_tasks
from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.stack.stack import PolicyStack


@dataclass(frozen=True)
class Contestant:
    """Hold one stack of a run. ``share``: attended share of dense's pairs, set per sample; None keeps the stack's budget."""

    name: str
    family: str  # the stack's name without the share; plots draw one line per family
    stack: PolicyStack
    share: float | None = None

    @property
    def digest(self) -> str:
        """Return a digest that is equal for contestants with equal behaviour, independent of their names."""
        if self.share is None:
            return self.stack.digest
        return hashlib.sha256(f"{self.stack.digest} {self.share:g}".encode()).hexdigest()[:16]

    def described(self) -> Record:
        """Return the description for the manifest."""
        return {"digest": self.digest, "share": self.share, "described": self.stack.describe()}

    def fields(self) -> Record:
        """Return the fields that every record of this contestant has."""
        return {"stack": self.name, "family": self.family, "digest": self.digest}

    def fitted(self, lengths: Sequence[int], answers: Sequence[int]) -> PolicyStack:
        """Return the stack for one dialogue. lengths: conversation tokens at each answer. answers: tokens of each answer."""
        if self.share is None:
            return self.stack
        # Outputs are attended besides the budget: half of them on average over an answer.
        uncounted = uncounted_outputs_of(self.stack, sum(answers) / len(answers) / 2)
        budget = budget_for(self.share, sum(lengths) / len(lengths), uncounted)
        try:
            return with_budget(self.stack, budget)
        except ConfigError as error:
            raise ConfigError(
                f"{self.share:.0%} of this dialogue, {budget} pairs, is no budget for this stack: {error}"
            ) from error


def contestants(stacks: Iterable[PolicyStack], shares: Sequence[float] = ()) -> list[Contestant]:
    """Return each stack, and each stack that has a budget with each of the shares (0: its own budget), without duplicates.

    Raises ConfigError for a name with two meanings.
    """
    for share in shares:
        if not 0 <= share <= 1:
            raise ConfigError(f"--attended {share:g}: must be from 0 (a stack's own budget) to 1")
    found: dict[str, Contestant] = {}
    for stack in stacks:
        own = shares if shares and budget_of(stack) is not None else (0.0,)
        for each_share in (share or None for share in own):
            name = stack.name if each_share is None else f"{stack.name}@{each_share:.3g}"
            each = Contestant(name, stack.name, stack, each_share)
            if found.setdefault(name, each).digest != each.digest:
                raise ConfigError(f"two different stacks are called {stack.name!r}: give one of them another 'name'")
    return list(found.values())


class QualitySuite(BaseModel):
    """Hold a suite file. Command-line options of the same names replace its values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    name: str
    description: str = ""
    tasks: tuple[dict[str, Any], ...] = Field(min_length=1, description="Each a task's name and its options.")
    stacks: tuple[str, ...] = Field(("dense", "loopserve"), min_length=1, description="Presets or files of stacks.")
    attended: tuple[float, ...] = Field(
        (),
        description="Shares of dense's KV pairs that every stack with a budget attends to; its own budget by default.",
    )
    history: History = Field("gold", description="What answers of earlier turns the conversation goes on with.")
    limit: int | None = Field(None, gt=0, description="Dialogues of each task; all by default.")
    coverage: bool = Field(False, description="Measure realised coverage, as costly as dense attention.")


@runtime_checkable
class Found(Protocol):
    """Describe a task that inspects its data and reports the result."""

    def report(self) -> list[str]: ...


def load_suite(spec: str) -> QualitySuite:
    """Return a suite by name or file. Raises ConfigError, one line per mistake, for an invalid suite."""
    document = read_suite(spec, SuiteKind.QUALITY)
    return document.parse(QualitySuite, known_options=lambda at: None if at else list(QualitySuite.model_fields))


def with_source(suite: QualitySuite, source: str) -> QualitySuite:
    """Return the suite with ``source`` set for every task that reads data. Raises ConfigError if no task does."""
    reading = {name for name, kind in known_tasks().items() if "source" in kind.options.model_fields}
    if not any(entry.get("task") in reading for entry in suite.tasks):
        raise ConfigError(f"--source {source}: suite {suite.name!r} has no task that reads data")
    tasks = tuple(entry | {"source": source} if entry.get("task") in reading else entry for entry in suite.tasks)
    return suite.model_copy(update={"tasks": tasks})


def suite_tasks(suite: QualitySuite, only: Sequence[str] = ()) -> list[Task]:
    """Return the tasks of a suite, or those named. Raises ConfigError for wrong options and for unknown names."""
    named = [str(entry.get("name") or entry.get("task")) for entry in suite.tasks]
    for name in only:
        if name not in named:
            raise ConfigError(f"suite {suite.name!r} has no task {name!r}{did_you_mean(name, named)}")
    # Only selected tasks are made: the data of the others need not be present.
    return make_tasks([entry for name, entry in zip(named, suite.tasks, strict=True) if not only or name in only])


def suite_digest(suite: QualitySuite, tasks: Iterable[Task]) -> str:
    """Return a digest that is equal for suites with equal tasks: names, versions and options."""
    asked = [[task.name, task.version] for task in tasks]
    return hashlib.sha256(json.dumps([suite.tasks, asked], sort_keys=True).encode()).hexdigest()[:16]
