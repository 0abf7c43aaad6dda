import math
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from loopserve.core.errors import ConfigError
from loopserve.core.stack.config import (
    MAX_BYTES,
    Document,
    InvalidDocument,
    dotted,
    parse_yaml,
    read_yaml,
    to_yaml,
)


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    budget: int = Field(1, gt=0)
    alpha: float = 0.5
    colour: Colour = Colour.RED
    sizes: tuple[int, ...] = ()


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()


def problems(text: str) -> list[str]:
    with pytest.raises(InvalidDocument) as error:
        parse_yaml(text, "my.yaml").parse(Outer)
    assert error.value.exit_code == 2
    return str(error.value).splitlines()


def test_plain_yaml_becomes_a_model():
    text = "name: x\ninner: {budget: 8, alpha: 1, colour: blue, sizes: [1, 2]}\nseveral:\n- alpha: 1e-3\n"
    parsed = parse_yaml(text, "my.yaml").parse(Outer)
    assert parsed.inner == Inner(budget=8, alpha=1.0, colour=Colour.BLUE, sizes=(1, 2))
    assert parsed.several[0].alpha == 0.001


def test_every_mistake_of_a_file_is_reported_with_line_and_field():
    text = """\
name: x
inner:
  budget: -3
  alpha: .nan
  colour: green
several:
  - budget: "8"
  - {budget: true, sizes: 3}
  - budge: 3
inner: {}
"""
    assert problems(text) == [
        "my.yaml:3: inner.budget: Input should be greater than 0 (got -3)",
        "my.yaml:4: inner.alpha: Input should be a finite number (got nan)",
        "my.yaml:5: inner.colour: Input should be 'red' or 'blue' (got 'green')",
        "my.yaml:7: several[0].budget: Input should be a valid integer (got '8')",
        "my.yaml:8: several[1].budget: Input should be a valid integer (got True)",
        "my.yaml:8: several[1].sizes: Input should be a valid array (got 3)",
        "my.yaml:9: several[2].budge: unknown key",
        "my.yaml:10: inner: duplicate key, first given in line 2",
    ]


def test_a_missing_key_is_placed_where_its_parent_stands():
    assert problems("inner:\n  budget: 1\n") == ["my.yaml:1: name: this key is required"]


def test_a_key_given_twice_is_an_error_even_if_all_else_is_right():
    assert problems("name: a\nname: b\n") == ["my.yaml:2: name: duplicate key, first given in line 1"]


def test_unknown_keys_get_suggestions_where_the_known_ones_are_known():
    document = parse_yaml("name: x\ninner:\n  budgt: 3\n", "my.yaml")
    with pytest.raises(InvalidDocument, match=r"my.yaml:3: inner.budgt: unknown key; did you mean 'budget'\?"):
        document.parse(Outer, known_options=lambda at: Inner.model_fields if at == ("inner",) else None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "my.yaml: the file is empty"),
        ("# nothing\n", "my.yaml: the file is empty"),
        ("name: [1,\n", "broken YAML: while parsing a flow node"),
        ("name: a: b\n", "my.yaml:1: broken YAML: mapping values are not allowed here"),
        ("name: x\n\tinner: 3\n", "my.yaml:2: broken YAML"),
        ("name: *who\n", "broken YAML: found undefined alias"),
        ("name: x\n---\nname: y\n", "expected a single document"),
        ("name: \x00\n", "broken YAML"),
        ("name: !!python/object:os.system ls\n", "my.yaml:1: name: a value of type 'python/object:os.system'"),
        ("name: 2020-01-01\n", "type 'timestamp' has no place here; quote it"),
        ("name: !!int x\n", "name: not a int"),
        ("? [a, b]\n: 3\n", "a key must be a single word"),
        ("name: &loop [*loop]\n", "name[0]: refers to itself"),
        ("[" * 1000, "nested deeper"),
        ('name: "\\ud800"\n', "no plain data"),
    ],
)
def test_broken_yaml_is_refused_in_one_line(text: str, complaint: str):
    assert any(complaint in line for line in problems(text)), problems(text)


def test_a_bomb_of_nested_aliases_is_refused():
    levels = [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)]
    assert "aliases followed" in problems("\n".join(["a: &a [x, x]", *levels]))[0]


def test_an_alias_within_reason_is_followed():
    text = "name: x\ninner: &i {budget: 4}\nseveral: [*i, *i]\n"
    assert [each.budget for each in parse_yaml(text, "my.yaml").parse(Outer).several] == [4, 4]


def test_yaml_1_2_words_are_words():
    assert parse_yaml("name: on", "my.yaml").data == {"name": "on"}
    assert parse_yaml("name: 010", "my.yaml").data == {"name": 10}


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
    big, binary = tmp_path / "big.yaml", tmp_path / "binary.yaml"
    big.write_bytes(b"#" * (MAX_BYTES + 1))
    binary.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_yaml(big)
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_yaml(binary)


def test_a_dict_has_no_lines_but_the_same_messages():
    for value, complaint in ((math.nan, "got nan"), (math.inf, "got inf"), ("1", "valid number")):
        with pytest.raises(InvalidDocument, match="options: inner.alpha: Input should be a .*" + complaint):
            Document({"name": "x", "inner": {"alpha": value}}, "options").parse(Outer)
    with pytest.raises(InvalidDocument, match="no plain data"):
        Document({"name": object()}, "options").parse(Outer)
    assert Document({"name": "x", "inner": {"colour": Colour.BLUE}}, "options").parse(Outer).inner.colour is Colour.BLUE


def test_a_long_wrong_value_is_cut():
    (line,) = problems("name: x\ninner: {budget: " + "a" * 500 + "}\n")
    assert len(line) < 160 and line.endswith("...)")


def test_dotted():
    assert dotted(()) == ""
    assert dotted(("layers", 0, "decode", "budget")) == "layers[0].decode.budget"


# Without control characters and line separators: ruamel writes some of them so that it cannot read them back.
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="\ufeff"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(plain)
def test_what_is_written_is_read_back(data: Any):
    assert parse_yaml(to_yaml(data), "written").data == data


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab:-[]{}&*!|>?#'\"%@,. \n\t0\x00é<~"), max_size=40))
def test_no_text_ends_in_anything_but_a_document_or_a_config_error(text: str):
    with suppress(ConfigError):
        parse_yaml(text, "any").parse(Outer)
