"""States become JSON and tensors and come back equal; what cannot be written, or is damaged, is named with its place."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopserve.core.errors import PolicyError
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.scoring import ScoredState
from loopserve.core.policy.state import pack_state, types_within, unpack_state
from loopserve.core.policy.wrappers import ScoredWrapper
from loopserve.policies.decode.adakv import AdaKVDecode
from loopserve.policies.decode.expected_attention import ExpectedAttentionDecode, QueryStatistics
from loopserve.testing.inputs import make_inputs

if TYPE_CHECKING:
    from fractions import Fraction


class Mode(StrEnum):
    ONE = "one"
    TWO = "two"


class Plain(Enum):
    A = (1, 2)


@dataclass(frozen=True)
class Inner:
    mode: Mode
    parts: tuple[Tensor, ...] = ()

    @cached_property
    def total(self) -> int:
        return len(self.parts)


@dataclass(slots=True)
class Slotted:
    number: int = 0


@dataclass
class Everything:
    inner: dict[int, Inner] = field(default_factory=dict)
    recent: deque[Tensor] = field(default_factory=lambda: deque(maxlen=3))
    slotted: Slotted | None = None
    plain: Plain = Plain.A
    summaries: dict[int, KeySummaries] = field(default_factory=dict)
    selection: KVSelection | None = None
    more: Any = None
    computed: int = field(default=7, init=False)


TYPES = types_within(Everything)


def through_json(state: Any, types: Any = TYPES) -> Any:
    tree, tensors = pack_state(state, types)
    return unpack_state(json.loads(json.dumps(tree, allow_nan=False)), tensors, types)


def equal(one: Any, other: Any) -> bool:
    """Whether two values are of the same types and hold the same, NaN included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, float):
        return one.hex() == other.hex()
    if isinstance(one, deque):
        return one.maxlen == other.maxlen and equal(list(one), list(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if hasattr(one, "__dataclass_fields__"):
        return all(equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return bool(one == other)


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
TENSORS = st.builds(
    lambda shape, dtype: torch.arange(int(torch.tensor(shape).prod()) if shape else 1).reshape(shape).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.sampled_from([*Mode, Plain.A, torch.device("cpu"), torch.bfloat16])
    | TENSORS
    | st.builds(Inner, st.sampled_from(Mode), st.lists(TENSORS, max_size=2).map(tuple))
    | st.builds(Slotted, st.integers())
)
KEYS = st.integers() | st.text() | st.tuples(st.integers(), st.text()) | st.sampled_from(Mode) | st.booleans()
VALUES = st.recursive(
    LEAVES,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.lists(inside, max_size=3).map(tuple)
        | st.builds(deque, st.lists(inside, max_size=3), st.none() | st.integers(3, 5))
        | st.dictionaries(KEYS, inside, max_size=3)
        | st.builds(lambda each: Everything(more=each), inside)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_whatever_a_state_is_made_of_comes_back_equal(value: Any) -> None:
    assert equal(through_json(value), value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0, 1e308, 5e-324, 2**200])
def test_numbers_that_json_does_not_have_come_back(value: float) -> None:
    assert repr(through_json(value)) == repr(value)


def test_nan_and_the_sign_of_zero_survive_in_tensors() -> None:
    given_ = torch.tensor([float("nan"), -0.0, float("inf")])
    found = through_json({0: given_})[0]
    assert torch.equal(found.view(torch.int32), given_.view(torch.int32))


def test_parts_of_the_framework_come_back() -> None:
    summaries = KeySummaries(4, 8)
    summaries.update(torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0)))
    selection = KVSelection.from_heads([torch.tensor([1, 4]), torch.tensor([2])], 5, Retention.EVICT)
    assert selection.ragged  # cached on the object: not a part of what is written
    found = through_json(Everything(summaries={3: summaries}, selection=selection))
    assert (found.summaries[3].page, found.summaries[3].bits, found.summaries[3].columns) == (4, 8, 0)
    assert torch.equal(found.selection.indices, selection.indices) and found.selection.retention is Retention.EVICT
    assert found.selection.ragged


def test_an_object_held_twice_is_one_object_again() -> None:
    shared, tensor = [1], torch.zeros(2)
    found = through_json({"a": shared, "b": (shared, tensor), "c": tensor, "d": [1]})
    assert found["a"] is found["b"][0] and found["c"] is found["b"][1] and found["d"] is not found["a"]


def test_what_is_written_is_a_copy_and_contiguous() -> None:
    whole = torch.zeros(100, 4)
    state = {"view": whole[:, 1], "expanded": torch.ones(1, 3).expand(5, 3)}
    _, tensors = pack_state(state, {})
    whole.fill_(9.0)
    assert all(each.is_contiguous() and each.untyped_storage().nbytes() == each.numel() * 4 for each in tensors)
    assert tensors[0].sum() == 0


class Unknown:
    """Not a type that a state is made of."""


@dataclass
class Unnamed:
    value: int = 0


def with_an_attribute() -> Everything:
    found = Everything()
    found.stray = 1  # type: ignore[attr-defined]
    return found


def holding_itself() -> list[Any]:
    found: list[Any] = []
    found.append({"again": found})
    return found


def nested(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"state\['a'\]\[1\] is a builtins\.set, which cannot be written: a state is made of"),
        (Everything(more=print), r"state\.more is a builtins\.builtin_function_or_method"),
        (Everything(more=Unknown()), r"state\.more is a tests\.core\.test_state\.Unknown, which cannot be written"),
        (Everything(more={3: Unnamed()}), r"state\.more\[3\] is a .*Unnamed, .*: name its type in .* state_types"),
        (OrderedDict(a=1), r"state is a collections\.OrderedDict"),
        (with_an_attribute(), r"state\.stray is no field of Everything"),
        (holding_itself(), r"state\[0\]\['again'\] holds itself \(list\)"),
        ({0: torch.zeros(2, device="meta")}, r"state\[0\] is a tensor \(.*meta\) that cannot be written"),
        ({0: torch.zeros(2).to_sparse()}, r"state\[0\] is a tensor \(torch\.sparse_coo"),
        ({0: torch.nn.Parameter(torch.zeros(2))}, r"state\[0\] is a torch\.nn\.parameter\.Parameter"),
        ([make_inputs()], r"state\[0\] is a AttentionInputs, which holds parts of the store and ends with its pass"),
        (nested(200), "nested deeper than 100 levels"),
    ],
)
def test_what_cannot_be_written_is_named_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        pack_state(value, TYPES)


@pytest.mark.parametrize(
    "tree",
    [
        [1],
        {},
        {"list": 3},
        {"list": [[1]]},
        {"unknown": 1},
        {"list": [], "dict": []},
        {"tensor": 1},
        {"tensor": -1},
        {"tensor": "0"},
        {"same": 0},
        {"dict": [[{"list": []}, 1]]},
        {"dict": [1]},
        {"dtype": "load"},
        {"device": "nowhere"},
        {"bytes": "!"},
        {"float": "many"},
        {"enum": ["Mode", "THREE"]},
        {"object": ["Slotted", {}]},
        {"object": ["Slotted", {"number": 1, "other": 2}]},
        {"object": ["Slotted", 3]},
        {"object": ["KeySummaries", {"tuple": [0, 3]}]},
        {"object": ["os.system", {"command": "true"}]},
        {"deque": [-1, []]},
    ],
)
def test_damage_is_an_error_of_one_kind(tree: Any) -> None:
    with pytest.raises(PolicyError, match=r"^state"):
        unpack_state(tree, [torch.zeros(1)], TYPES)


def test_types_are_found_through_annotations_and_nothing_else() -> None:
    assert {"Everything", "Inner", "Mode", "Slotted", "Plain", "KeySummaries", "KVSelection", "Retention"} == set(TYPES)
    assert types_within(dict[str, list[Slotted | None]]) == {"Slotted": Slotted}
    with pytest.raises(PolicyError, match="has no type 'Unnamed'; known are Everything"):
        unpack_state({"object": ["Unnamed", {"value": 1}]}, [], TYPES)


@dataclass
class Typed:
    value: Fraction | None = None


def test_annotations_that_cannot_be_resolved_and_two_types_of_one_name_are_named() -> None:
    with pytest.raises(PolicyError, match=r"'Typed' cannot be resolved .*Fraction.*import at module level"):
        types_within(Typed)
    other = type("Slotted", (Slotted,), {"__qualname__": "Slotted"})
    with pytest.raises(PolicyError, match="two types named 'Slotted'"):
        types_within(Slotted, other)


class Keeps(DecodeCompressor[Everything]):
    name, paper = "keeps", ""

    def init_state(self) -> Everything:
        return Everything()


class KeepsItsWay(Keeps):
    """Writes a set as a list."""

    def pack_state(self, state: Any) -> Any:
        return sorted(state.more), []

    def unpack_state(self, packed: Any, device: Any = None) -> Any:
        return Everything(more=set(packed[0]))


class Sparse(PrefillSparsifier):
    name, paper, state_types = "sparse", "", (Slotted,)

    def sparsify(self, inputs: AttentionInputs) -> Any:
        raise NotImplementedError


def test_a_policy_writes_its_own_state_and_no_other() -> None:
    policy = Keeps()
    assert equal(policy.unpack_state(policy.pack_state(Everything(more=[1]))), Everything(more=[1]))
    with pytest.raises(PolicyError, match="its state is a Everything, what was written is a list"):
        policy.unpack_state(({"list": []}, []))
    its_way = KeepsItsWay()
    assert its_way.unpack_state(its_way.pack_state(Everything(more={3, 1}))).more == {1, 3}
    sparse = Sparse()
    assert sparse.unpack_state(sparse.pack_state({0: Slotted(3)})) == {0: Slotted(3)}


def test_a_wrapper_writes_what_the_policy_inside_keeps() -> None:
    inner = ExpectedAttentionDecode(ExpectedAttentionDecode.Config(budget=40))
    wrapper = AdaKVDecode(AdaKVDecode.Config(inner=inner))
    assert isinstance(wrapper, ScoredWrapper)
    state = ScoredState(statistics={2: QueryStatistics(3, torch.ones(2, 4), torch.ones(2, 4, 4))})
    assert equal(wrapper.unpack_state(wrapper.pack_state(state)), state)


def test_tensors_and_devices_go_where_the_session_is() -> None:
    tree, tensors = pack_state({"where": torch.device("cuda:1"), "what": torch.zeros(1)}, {})
    found = unpack_state(tree, tensors, {}, torch.device("cpu"))
    assert found["where"] == torch.device("cpu") and found["what"].device.type == "cpu"
