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
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from loopserve.bench.quality.conversation import History
from loopserve.bench.samples import Task
from loopserve.bench.suite_files import SuiteKind, read_suite
from loopserve.bench.tasks import known_tasks, make_tasks
from loopserve.core.errors import ConfigError, did_you_mean


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
