"""Register every task by name, with its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from loopserve.bench.samples import Task, TaskOptions
from loopserve.bench.tasks import synthetic
from loopserve.bench.tasks.longbench import SETS, LongBenchOptions, LongBenchTask
from loopserve.bench.tasks.published import PublishedOptions, PublishedTask
from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.stack.config import Document


@dataclass(frozen=True)
class TaskKind:
    """Hold a task that a suite can name."""

    name: str
    about: str
    options: type[TaskOptions]
    make: Callable[[Any], Task]


def known_tasks() -> dict[str, TaskKind]:
    """Return task kinds by name, in the order of the documentation."""
    return dict(_KINDS)


def task_by_name(name: str, options: Mapping[str, Any] | None = None, source: str | None = None) -> Task:
    """Return the task with these options, as YAML gives them.

    source: origin of the options for messages; the task's name by default. Raises ConfigError, one line per mistake,
    for an unknown name, wrong options or missing data.
    """
    if name not in _KINDS:
        raise ConfigError(f"unknown task {name!r}{did_you_mean(name, _KINDS)}")
    kind = _KINDS[name]
    document = Document(dict(options or {}), source or name)
    return kind.make(document.parse(kind.options, known_options=lambda at: None if at else kind.options.model_fields))


def make_tasks(entries: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Return the tasks of a suite. An entry has the task's name as ``task`` and its options beside it.

    Raises ConfigError if two tasks have the same name.
    """
    made: list[Task] = []
    for number, entry in enumerate(entries):
        options = dict(entry)
        name = options.pop("task", None)
        if not isinstance(name, str):
            raise ConfigError(f"tasks[{number}]: `task` must be the name of a task (known: {', '.join(_KINDS)})")
        made.append(task_by_name(name, options, f"tasks[{number}] ({name})"))
        if made[-1].name in {task.name for task in made[:-1]}:
            raise ConfigError(
                f"tasks[{number}]: there are two tasks {made[-1].name!r}: give one of them another `name`"
            )
    return made


_SYNTHETIC: dict[str, type[synthetic.RecallOptions]] = {
    "recall": synthetic.RecallOptions,
    "multi_key": synthetic.MultiKeyOptions,
    "chains": synthetic.ChainOptions,
    "list_all": synthetic.ListAllOptions,
    "long_answers": synthetic.LongAnswerOptions,
}
_KINDS: dict[str, TaskKind] = {
    name: TaskKind(
        name,
        (options.__doc__ or "").split("\n")[0].split(". ")[0].rstrip("."),
        options,
        partial(synthetic.SyntheticTask, name),
    )
    for name, options in _SYNTHETIC.items()
}
_KINDS["published"] = TaskKind(
    "published", "the benchmark published with the paper", PublishedOptions, partial(PublishedTask, "published")
)
_KINDS |= {
    f"longbench-{each.name}": TaskKind(
        f"longbench-{each.name}",
        f"LongBench {each.name} ({each.kind}), recombined into dialogues",
        LongBenchOptions,
        partial(LongBenchTask, f"longbench-{each.name}"),
    )
    for each in SETS.values()
}
