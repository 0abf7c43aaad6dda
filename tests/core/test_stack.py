import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopserve.core.errors import ConfigError
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.registry import Registry
from loopserve.core.stack.config import InvalidDocument, parse_yaml, to_yaml
from loopserve.core.stack.stack import Override, resolve_stack
from loopserve.core.stack.stack_file import LayerRange, read_stack, stack_schema
from tests.core.fake_policies import AShape, Dense, Full, Snap, fake_registry

MINIMAL = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}


def complaints(text: str, registry: Registry | None = None) -> list[str]:
    with pytest.raises(InvalidDocument) as error:
        read_stack(parse_yaml(text, "my.yaml"), registry or fake_registry())
    return str(error.value).splitlines()


# What a file may say


def test_a_file_becomes_a_stack(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\ndescription: Mine.\nprefill: {policy: a_shape, alpha: 1}\n"
        "decode:\n  policy: snap\n  budget: 64\n  kernels: [3, 5]\n"
        "layers:\n- at: [0, -1]\n  decode: {policy: full}\n- at: 1-3\n  prefill: {policy: dense}\n"
    )
    stack = resolve_stack(file, fake_registry())
    assert stack == resolve_stack(str(file), fake_registry())
    assert (stack.name, stack.source, stack.description) == ("mine", str(file), "Mine.")
    assert isinstance(stack.decode, Snap)
    assert stack.decode.config.model_dump() == {
        "budget": 64,
        "window": 32,
        "retention": Retention.KEEP,
        "kernels": (3, 5),
    }
    assert [type(stack.decode_for(index, 6)) for index in range(6)] == [Full, Snap, Snap, Snap, Snap, Full]
    assert [type(stack.prefill_for(index, 6)) for index in range(6)] == [AShape, Dense, Dense, Dense, AShape, AShape]


def test_a_stack_is_its_own_spec():
    stack = resolve_stack(MINIMAL, fake_registry())
    assert resolve_stack(stack, fake_registry()) is stack
    assert (stack.name, stack.source) == ("custom", "stack")


def test_first_match_wins_and_what_it_does_not_give_falls_through_to_the_default():
    spec = MINIMAL | {
        "layers": [
            {"at": [2], "prefill": {"policy": "a_shape", "sinks": 1}},
            {"at": "0-3", "prefill": {"policy": "a_shape", "sinks": 2}, "decode": {"policy": "snap"}},
        ]
    }
    stack = resolve_stack(spec, fake_registry())
    assert stack.prefill_for(2, 8).config.sinks == 1  # type: ignore[attr-defined]
    assert isinstance(stack.decode_for(2, 8), Full)
    assert stack.prefill_for(3, 8).config.sinks == 2  # type: ignore[attr-defined]
    assert isinstance(stack.decode_for(3, 8), Snap)


def test_layers_that_share_a_policy_share_the_object():
    stack = resolve_stack(MINIMAL | {"layers": [{"at": [1], "prefill": {"policy": "a_shape"}}]}, fake_registry())
    assert stack.decode_for(1, 4) is stack.decode_for(3, 4) is stack.decode


def test_every_mistake_of_a_stack_file_in_one_go():
    text = """\
version: 2
prefill: {policy: a_shap, sinks: 3}
decode:
  policy: snap
  budget: -3
  retention: evct
  windw: 3
layers:
- at: [0, x]
  prefill: {policy: a_shape, alpha: .nan}
- at: 3-1
  decode: {policy: snap, budget: 8}
  prefil: 3
- decode: snap
- at: []
  prefill: {policy: snap}
- at: [true]
- 7
nam: x
"""
    known = "(known: a_shape, dense, sliding_only)"
    assert complaints(text) == [
        "my.yaml:1: version: Input should be 1 (got 2)",
        f"my.yaml:2: prefill.policy: unknown prefill policy 'a_shap'; did you mean 'a_shape'? {known}",
        "my.yaml:5: decode.budget: Input should be greater than 0 (got -3)",
        "my.yaml:6: decode.retention: Input should be 'keep' or 'evict' (got 'evct')",
        "my.yaml:7: decode.windw: unknown key; did you mean 'window'? "
        "(known: budget, kernels, policy, retention, window)",
        "my.yaml:9: layers[0].at: 'x' names no layer: write a list such as [0, 1, -1], or a range such as '0-3'",
        "my.yaml:10: layers[0].prefill.alpha: Input should be a finite number (got nan)",
        "my.yaml:11: layers[1].at: the range '3-1' is empty: write the lower layer first",
        "my.yaml:12: layers[1].decode: window (32) exceeds the budget (8)",
        "my.yaml:13: layers[1].prefil: unknown key; did you mean 'prefill'? (known: at, decode, prefill)",
        "my.yaml:14: layers[2].at: this key is required",
        "my.yaml:14: layers[2].decode: must name a policy, such as {policy: evicting}",
        "my.yaml:15: layers[3].at: names no layer: write a list such as [0, 1, -1], or a range such as '0-3'",
        f"my.yaml:16: layers[3].prefill.policy: unknown prefill policy 'snap'; it is a decode policy {known}",
        "my.yaml:17: layers[4].at: True names no layer: write a list such as [0, 1, -1], or a range such as '0-3'",
        "my.yaml:18: layers[5]: Input should be an object (got 7)",
        "my.yaml:19: nam: unknown key; did you mean 'name'? "
        "(known: decode, description, layers, name, prefill, version)",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- dense\n", "my.yaml:1: a stack is a mapping with the keys version, name, "),
        ("dense\n", "my.yaml:1: a stack is a mapping"),
        ("prefill: {policy: dense}\n", "my.yaml:1: decode: this key is required"),
        ("prefill: {policy: dense}\ndecode: {budget: 3}\n", "my.yaml:2: decode: must name a policy"),
        ("prefill: {policy: 3}\ndecode: {policy: full}\n", "my.yaml:1: prefill.policy: must be the name of a policy"),
        ("prefill: {policy: dense, x: 1}\ndecode: {policy: full}\n", "prefill.x: unknown key (known: policy)"),
        (
            "name: ''\nprefill: {policy: dense}\ndecode: {policy: full}\n",
            "name: String should have at least 1 character",
        ),
        ("prefill: {policy: dense}\ndecode: {policy: snap, budget: '8'}\n", "valid integer (got '8')"),
        ("prefill: {policy: dense}\ndecode: {policy: snap, budget: yes}\n", "valid integer (got 'yes')"),
        ("prefill: {policy: dense}\ndecode: {policy: snap, budget: true}\n", "valid integer (got True)"),
    ],
)
def test_what_a_stack_file_may_not_say(text: str, complaint: str):
    assert any(complaint in line for line in complaints(text)), complaints(text)


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ("decode: {policy: snap, budget: 100000000000000000000000}", "decode.budget: must be "),
        ("decode: {policy: snap, budget: 2147483648}", "my.yaml:2: decode.budget: must be at most 2,147,483,647"),
        ("decode: {policy: full}\nlayers: [{at: 10000}]", "my.yaml:3: layers[0].at: no model has a layer 10000"),
        ("decode: {policy: full}\nlayers: [{at: '0-99999'}]", "no model has a layer 99999"),
        ("decode: {policy: full}\nlayers: [{at: -10001}]", "no model has a layer -10001"),
        (
            "decode: {policy: full}\nlayers: [{at: 0\u20133}]",
            "'0\u20133' names no layer (it holds '\u2013' U+2013 EN DASH)",
        ),
        ("decode: {policy: full}\nlayers: [{at: '٣-٤'}]", "U+0663 ARABIC-INDIC DIGIT THREE"),
    ],
)
def test_numbers_beyond_any_model_and_digits_that_are_none_are_refused(part: str, complaint: str):
    text = f"prefill: {{policy: dense}}\n{part}\n"
    assert any(complaint in line for line in complaints(text)), complaints(text)


def test_bad_values_in_a_dict_are_refused_too():
    bad = MINIMAL | {"prefill": {"policy": "a_shape", "alpha": float("nan")}}
    with pytest.raises(ConfigError, match=r"^stack: prefill.alpha: Input should be a finite number \(got nan\)$"):
        resolve_stack(bad, fake_registry())


def test_an_unknown_stack_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"unknown stack 'snapk'; did you mean 'snapkv'\? .*path of a YAML file"):
        resolve_stack("snapk", fake_registry())
    with pytest.raises(ConfigError, match=r"my\.yaml: cannot be read: No such file"):
        resolve_stack("my.yaml", fake_registry())
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_stack(Path("nowhere"), fake_registry())


# What a stack says of itself


def test_describe_spells_out_every_option_and_makes_an_equal_stack():
    spec = MINIMAL | {"layers": [{"at": [0, "2-3", -1], "decode": {"policy": "snap", "retention": "evict"}}]}
    stack = resolve_stack(spec, fake_registry())
    described = stack.describe()
    assert described["layers"] == [
        {
            "at": [0, "2-3", -1],
            "decode": {"policy": "snap", "budget": 1024, "window": 32, "retention": "evict", "kernels": []},
        }
    ]
    assert resolve_stack(described, fake_registry()) == stack


def test_digest_tells_what_is_done_not_what_it_is_called():
    stack = resolve_stack(MINIMAL, fake_registry())
    renamed = resolve_stack(MINIMAL | {"name": "other", "description": "Else."}, fake_registry())
    changed = resolve_stack(MINIMAL | {"decode": {"policy": "snap"}}, fake_registry())
    assert stack.digest == renamed.digest != changed.digest
    assert stack != renamed
    assert len({stack, resolve_stack(MINIMAL, fake_registry()), changed}) == 2


def test_digest_is_stable_over_runs():
    assert resolve_stack(MINIMAL, fake_registry()).digest == "f4ffbe6adae91091"


indices = st.integers(-40, 40)
spans = st.builds(
    lambda first, length: f"{first}-{first + length}" if first >= 0 or first + length < 0 else f"{first}--1",
    indices,
    st.integers(0, 10),
)
prefills = st.just({"policy": "dense"}) | st.builds(
    lambda sinks, alpha: {"policy": "a_shape", "sinks": sinks, "alpha": alpha},
    st.integers(0, 99),
    st.floats(0, 1, exclude_min=True),
)
decodes = st.just({"policy": "full"}) | st.builds(
    lambda budget, kernels, retention: {
        "policy": "evicting",
        "budget": budget,
        "window": min(budget, 4),
        "kernels": kernels,
        "retention": retention,
    },
    st.integers(1, 10**9),
    st.lists(st.integers(-9, 9), max_size=3),
    st.sampled_from(["keep", "evict"]),
)
at = indices | spans | st.lists(indices | spans, min_size=1, max_size=4)
overrides = st.lists(st.fixed_dictionaries({"at": at}, optional={"prefill": prefills, "decode": decodes}), max_size=3)
stacks = st.fixed_dictionaries({"prefill": prefills, "decode": decodes}, optional={"layers": overrides})


@given(stacks)
def test_any_stack_survives_yaml_and_dict(spec: dict[str, Any]):
    registry = fake_registry()
    stack = resolve_stack(spec, registry)
    assert resolve_stack(stack.describe(), registry) == stack
    again = read_stack(parse_yaml(to_yaml(stack.describe()), "again.yaml"), registry)
    assert again.prefill.config == stack.prefill.config
    assert again.decode.config == stack.decode.config
    assert resolve_stack(stack.describe(), registry).digest == stack.digest


@given(stacks, st.integers(1, 48))
def test_every_layer_of_any_stack_has_its_policies(spec: dict[str, Any], total: int):
    stack = resolve_stack(spec, fake_registry())
    for index in range(total):
        named = [each for each in stack.overrides if any(index in _positions(span, total) for span in each.at)]
        expected = named[0] if named else Override(())
        assert stack.prefill_for(index, total) is (expected.prefill or stack.prefill)
        assert stack.decode_for(index, total) is (expected.decode or stack.decode)


def _positions(span: LayerRange, total: int) -> range:
    first = span.first if span.first >= 0 else span.first + total
    last = span.last if span.last >= 0 else span.last + total
    return range(first, last + 1)


# JSON Schema


def test_schema_tells_policies_apart_by_name():
    schema = stack_schema(fake_registry())
    assert schema["title"] == "loopserve stack" and schema["additionalProperties"] is False
    assert schema["properties"]["decode"]["discriminator"]["propertyName"] == "policy"
    snap = schema["$defs"]["decode_snap"]
    assert snap["properties"]["policy"]["const"] == "snap" and snap["required"] == ["policy"]
    assert snap["properties"]["budget"]["exclusiveMinimum"] == 0
    assert set(schema["$defs"]["LayerConfig"]["properties"]) == {"at", "prefill", "decode"}


def test_every_reference_of_the_schema_resolves():
    schema = stack_schema(fake_registry())

    found = re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema))
    assert found and set(found) <= set(schema["$defs"])
