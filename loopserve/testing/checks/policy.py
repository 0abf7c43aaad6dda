"""Check every policy: its name, documentation and options, and that serving changes only its session's state."""

from __future__ import annotations

import ast
import inspect
import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from loopserve.core.kv.selection import KVSelection
from loopserve.core.kv.selection_request import SelectionRequest
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Selections, Step
from loopserve.core.policy.wrappers import written
from loopserve.core.stack.config import parse_strictly, parse_yaml, to_yaml
from loopserve.testing.assertions import unchanged
from loopserve.testing.checks.sparsifier import attended, first_turn
from loopserve.testing.scripted import RecordedConversation
from loopserve.testing.subject import AnyPolicy, NotApplicable, Subject

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_SEED = 86243  # a value that no policy is likely to set itself


def name_is_snake_case(subject: Subject) -> None:
    """Check that the name is lower-case words joined by underscores, as stack files write it."""
    name = getattr(subject.policy, "name", None)
    assert isinstance(name, str) and _NAME.fullmatch(name), f"name is {name!r}"


def docstring_says_what_it_does(subject: Subject) -> None:
    """Check that the class has a docstring of its own whose first paragraph is a sentence, since `policies ls` shows it."""
    text = type(subject.policy).__dict__.get("__doc__") or ""
    assert len(text.split("\n\n")[0].split()) >= 3, f"the docstring begins with {text[:40]!r}"


def paper_is_a_link_or_empty(subject: Subject) -> None:
    """Check that the class declares its own paper: an http link, or "" where there is none."""
    paper = type(subject.policy).__dict__.get("paper")
    assert isinstance(paper, str), "the class itself declares no paper"
    assert not paper or re.match(r"https?://\S+\.\S+$", paper), f"paper is {paper!r}"


def docstring_gives_the_link(subject: Subject) -> None:
    """Check that a policy that has a paper gives its link in the docstring."""
    paper = str(getattr(subject.policy, "paper", ""))
    if not paper:
        raise NotApplicable("it has no paper")
    assert paper in (inspect.getdoc(type(subject.policy)) or ""), f"the docstring does not give {paper}"


def capabilities_are_declared(subject: Subject) -> None:
    """Check that capabilities and `effective_capabilities` are Capabilities, and an object can do no more than its class declares."""
    effective, declared = subject.policy.effective_capabilities, subject.policy.capabilities
    for each in (effective, declared):
        assert isinstance(each, Capabilities), f"expected Capabilities, got {each!r}"
    assert effective.layer_types <= declared.layer_types, (
        "the object serves layer types that the class does not declare"
    )
    assert effective.retentions <= declared.retentions, "the object can retain in ways that the class does not declare"


def config_is_frozen(subject: Subject) -> None:
    """Check that no option can be changed after the policy is made, since all sessions share it."""
    config = subject.policy.config
    assert config.model_config.get("frozen"), "Config is not frozen"
    for name in type(config).model_fields:
        try:
            setattr(config, name, getattr(config, name))
        except (ValidationError, AttributeError):
            continue
        raise AssertionError(f"option {name!r} can be set after the policy is made")


def unknown_options_are_refused(subject: Subject) -> None:
    """Check that an option that does not exist is an error, so that a misspelt one is not silently ignored."""
    given = {name: getattr(subject.policy.config, name) for name in type(subject.policy.config).model_fields}
    try:
        type(subject.policy.config)(**given | {"no_such_option": 1})
    except ValidationError:
        return
    raise AssertionError("an option 'no_such_option' is accepted")


def options_are_described(subject: Subject) -> None:
    """Check that every option has a description, from which the documentation and the command line are made."""
    bare = [name for name, field in type(subject.policy.config).model_fields.items() if not field.description]
    assert not bare, f"no description: {', '.join(bare)}"


class _Inside:
    """Hold the inner policies of a wrapper, from their written form (``core.policy.wrappers.Maker``)."""

    def __init__(self, policy: AnyPolicy) -> None:
        self.known: dict[str, Any] = {}
        inner = getattr(policy.config, "inner", None)
        while isinstance(inner, DecodeCompressor):
            self.known[inner.name] = type(inner)
            inner = getattr(inner.config, "inner", None)

    def inner(self, options: Any) -> DecodeCompressor[Any]:
        policy = self.known[options["policy"]]
        rest = {name: value for name, value in options.items() if name != "policy"}
        made: DecodeCompressor[Any] = policy(parse_strictly(policy.Config, rest, self))
        return made


def options_survive_a_yaml_round_trip(subject: Subject) -> None:
    """Check that the policy, written to a stack file and read again, makes an equal policy."""
    policy = subject.policy
    before = written(policy)
    options: dict[str, Any] = {**parse_yaml(to_yaml(before), "round trip").data}
    assert options.pop("policy") == policy.name
    after = written(type(policy)(parse_strictly(type(policy.config), options, _Inside(policy))))
    assert after == before, f"written as {before}, read as {after}"


def import_needs_no_transformers(subject: Subject) -> None:
    """Check that the policy's module does not import transformers when it is imported: a policy depends on no model family."""
    module = sys.modules.get(type(subject.policy).__module__)
    path = getattr(module, "__file__", None)
    if path is None:
        raise NotApplicable("its module has no source file")
    tree = ast.parse(Path(path).read_text("utf-8"))
    found = [line for line, name in _imported(tree.body) if name.split(".")[0] == "transformers"]
    assert not found, f"{path}:{found[0]} imports transformers"


def _imported(body: list[ast.stmt]) -> list[tuple[int, str]]:
    """Return (line, module) of each import that runs when a module is imported; not those inside functions."""
    found: list[tuple[int, str]] = []
    for each in body:
        if isinstance(each, ast.Import):
            found += [(each.lineno, alias.name) for alias in each.names]
        elif isinstance(each, ast.ImportFrom):
            found.append((each.lineno, each.module or ""))
        elif isinstance(each, ast.If) and "TYPE_CHECKING" in ast.unparse(each.test):
            found += _imported(each.orelse)
        elif isinstance(each, ast.If | ast.Try | ast.With | ast.ClassDef):
            found += _imported(each.body)
            for handler in getattr(each, "handlers", []):
                found += _imported(handler.body)
            found += _imported(getattr(each, "orelse", []))
    return found


def policy_object_stays_as_it_is(subject: Subject) -> None:
    """Check that serving changes no attribute of the policy object, since one object serves every session."""
    before = {name: snapshot(value) for name, value in vars(subject.policy).items()}
    _serve(subject)
    after = {name: snapshot(value) for name, value in vars(subject.policy).items()}
    touched = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not touched, f"changed while serving: {', '.join(touched)}"


def random_state_is_left_alone(subject: Subject) -> None:
    """Check that a draw comes from a generator of the policy's own: the global states of torch and of Python stay as they are."""
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            random.seed(_SEED)
            before = torch.random.get_rng_state(), random.getstate()
            _serve(subject)
            assert torch.equal(before[0], torch.random.get_rng_state()), "torch's global random state moved"
            assert before[1] == random.getstate(), "the global random state of Python moved"
    finally:
        random.setstate(python)


def inputs_stay_unchanged(subject: Subject) -> None:
    """Check that no tensor of a call is written to, neither by choosing nor by attending."""
    if isinstance(subject.policy, DecodeCompressor):
        watched = _Watched(subject.policy)
        RecordedConversation(watched, *subject.script()).run(subject.steps[:2])
        return
    inputs = first_turn()
    with unchanged(inputs):
        attended(subject.sparsifier.sparsify(inputs), inputs)


def _serve(subject: Subject) -> None:
    if isinstance(subject.policy, DecodeCompressor):
        RecordedConversation(subject.policy, *subject.script()).run(subject.steps[:2])
    else:
        inputs = first_turn()
        attended(subject.sparsifier.sparsify(inputs), inputs)


class _Watched(DecodeCompressor[Any]):
    """Pass every call on to a compressor and assert that no tensor of the call is written to."""

    def __init__(self, watched: DecodeCompressor[Any]) -> None:
        super().__init__(watched.config)
        self.watched = watched

    @property
    def dense_below_tokens(self) -> int:
        return self.watched.dense_below_tokens

    def init_state(self) -> Any:
        return self.watched.init_state()

    def end_turn(self, state: Any) -> None:
        self.watched.end_turn(state)

    def before_attention(self, inputs: AttentionInputs, state: Any) -> KVSelection | SelectionRequest | None:
        with unchanged(inputs):
            return self.watched.before_attention(inputs, state)

    def after_attention(self, inputs: AttentionInputs, state: Any) -> None:
        with unchanged(inputs):
            self.watched.after_attention(inputs, state)

    def after_forward(self, step: Step, state: Any) -> Selections | Observation | None:
        return self.watched.after_forward(step, state)


def snapshot(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return a copy of a value in a form that can be compared, and that later changes of the value do not affect."""
    if id(value) in above:
        return "a value that holds itself"
    above = (*above, id(value))
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), tuple(map(str, value.detach().flatten().tolist()))
    if isinstance(value, torch.Generator):
        return tuple(value.get_state().tolist())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, dict):
        return tuple((repr(key), snapshot(each, above)) for key, each in value.items())
    if isinstance(value, set | frozenset):
        return frozenset(map(repr, value))
    if isinstance(value, list | tuple):
        return tuple(snapshot(each, above) for each in value)
    if hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        return type(value).__qualname__, snapshot(vars(value), above)
    return repr(value)


CHECKS = (
    name_is_snake_case,
    docstring_says_what_it_does,
    paper_is_a_link_or_empty,
    docstring_gives_the_link,
    capabilities_are_declared,
    config_is_frozen,
    unknown_options_are_refused,
    options_are_described,
    options_survive_a_yaml_round_trip,
    import_needs_no_transformers,
    policy_object_stays_as_it_is,
    random_state_is_left_alone,
    inputs_stay_unchanged,
)
