"""Tasks by name, as suites name them."""

from __future__ import annotations

from typing import Any

import pytest

from loopserve.bench.samples import Task
from loopserve.bench.tasks import known_tasks, make_tasks, task_by_name
from loopserve.core.errors import ConfigError


def test_every_kind_says_what_it_is_and_describes_its_options() -> None:
    for name, kind in known_tasks().items():
        assert kind.name == name and len(kind.about) > 10 and "\n" not in kind.about
        for option, field in kind.options.model_fields.items():
            assert field.description, (name, option)


def test_the_twelve_longbench_sets_are_there() -> None:
    sets = [name for name in known_tasks() if name.startswith("longbench-")]
    assert len(sets) == 12 and {"longbench-narrativeqa", "longbench-multi_news", "longbench-triviaqa"} <= set(sets)


@pytest.mark.parametrize(
    ("name", "options"),
    [("recall", {}), ("published", {"source": "shipped"}), ("longbench-trec", {"source": "shipped", "turns": 1})],
)
def test_tasks_have_a_name_of_their_own_and_a_version(name: str, options: dict[str, Any]) -> None:
    task: Task = task_by_name(name, options)
    assert task.name == name and task.version
    renamed = task_by_name(name, {**options, "name": "mine"})
    assert renamed.name == "mine" and renamed.version == task.version
    [sample] = renamed.samples(1, 0)
    assert sample.task == "mine"


def test_an_unknown_name_is_one_line_with_a_suggestion() -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown task 'recal'; did you mean 'recall'\? \(known: .*longbench-trec.*\)$"
    ):
        task_by_name("recal")


def test_a_suite_lists_tasks_with_their_options() -> None:
    one, two = make_tasks(
        [{"task": "recall", "tokens": 512}, {"task": "recall", "name": "recall-long", "tokens": 4096}]
    )
    assert (one.name, two.name) == ("recall", "recall-long")
    assert "4096-" in next(iter(two.samples(1, 0))).id


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"tokens": 512}], r"^tasks\[0\]: `task` must be the name of a task \(known: recall, .*\)$"),
        ([{"task": "recall"}, {"task": "recall"}], r"^tasks\[1\]: there are two tasks 'recall': give one .* `name`$"),
        ([{"task": "recall"}, {"task": "chains", "turn": 2}], r"^tasks\[1\] \(chains\): turn: unknown key; .*'turns'"),
    ],
)
def test_wrong_entries_are_named_by_their_place(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tasks(entries)
