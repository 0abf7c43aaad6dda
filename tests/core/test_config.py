import math
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from ruamel.yaml import YAML

from loopserve.core.errors import ConfigError
from loopserve.core.stack import config
from loopserve.core.stack.config import (
    MAX_BYTES,
    MAX_PROBLEMS,
    MAX_VALUES,
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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("naмe: x\n", "my.yaml:1: naмe: unknown key, which holds 'м' U+043C CYRILLIC SMALL LETTER EM"),
        (
            "name: x\ninner: {b\u03c5dget: 1}\n",
            "my.yaml:2: inner.b\u03c5dget: unknown key, which holds '\u03c5' U+03C5 GREEK SMALL",
        ),
        ("name: x\n\u200binner: {}\n", "my.yaml:2: \\u200binner: unknown key, which holds U+200B ZERO WIDTH SPACE"),
        ("name: x\ninner: {colour: r\u0435d}\n", "(got 'r\u0435d': it holds '\u0435' U+0435 CYRILLIC SMALL LETTER IE)"),
        ("name: x\ninner: {budget: \uff13}\n", "(got '\uff13': it holds '\uff13' U+FF13 FULLWIDTH DIGIT THREE)"),
        ("a: 1\u2028b: {c: 1}", "the line holds U+2028 LINE SEPARATOR"),
        ("a: 1\nb: \x00", "my.yaml:2: broken YAML: U+0000 a control character may not stand in a file of text"),
        ("a:\n\t- 1\n", "indent with spaces"),
        ('"\\e[31mred\\n": 1\n', "my.yaml:1: \\x1b[31mred\\n: unknown key, which holds U+001B a control character"),
        ("\u03b1\u03b2\u03b3\u03b4\u03b5: 1\n", "'\u03b3' U+03B3 GREEK SMALL LETTER GAMMA and 2 more"),
    ],
)
def test_a_character_that_is_not_what_it_looks_like_is_named(text: str, complaint: str):
    with pytest.raises(InvalidDocument) as error:
        parse_yaml(text, "my.yaml").parse(
            Outer, known_options=lambda at: (Inner if at == ("inner",) else Outer).model_fields
        )
    assert any(complaint in line for line in str(error.value).splitlines()), str(error.value)
    assert str(error.value).replace("\n", "").isprintable()


def test_letters_of_other_alphabets_are_welcome_where_any_text_is():
    assert parse_yaml("name: größer als ε\n", "my.yaml").parse(Outer).name == "größer als ε"
    assert parse_yaml("\ufeffname: x\r\ninner: {budget: 2}\r\n", "my.yaml").parse(Outer).inner.budget == 2


class Counted(YAML):
    """Counts the parts of a text that are read, and refuses to make a tree of it."""

    events = 0

    def parse(self, stream: Any) -> Any:
        for event in super().parse(stream):
            Counted.events += 1
            yield event

    def compose(self, stream: Any) -> Any:
        raise AssertionError("a tree was made of a text that is to be refused before")


@pytest.mark.parametrize(
    ("text", "complaint", "most"),
    [
        ("[" * 5000, "my.yaml:1: nested deeper than 32 levels", 40),
        ("a: " + "[" * 5000 + "]" * 5000, "my.yaml:1: nested deeper than 32 levels", 40),
        ("{a: " * 5000, "nested deeper", 80),
        ("- " * 5000, "nested deeper", 40),
        ("? " * 5000, "nested deeper", 40),
        ("\n".join("  " * level + "a:" for level in range(500)), "my.yaml:33: nested deeper", 80),
        ("x: [" + "1, " * 60000 + "]", "my.yaml:1: holds more than 20,000 values", MAX_VALUES + 10),
        ("x:\n" + "- 1\n" * 60000, "my.yaml:19999: holds more than 20,000 values", MAX_VALUES + 10),
        ("".join(f"k{number}: &a{number} 1\n" for number in range(15000)), "holds more than", MAX_VALUES + 10),
    ],
)
def test_a_text_with_too_much_in_it_is_refused_after_a_bounded_part_of_it(
    text: str, complaint: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(config, "YAML", Counted)
    monkeypatch.setattr(Counted, "events", 0)
    assert complaint in problems(text)[0] and len(problems(text)) == 1
    assert Counted.events <= 2 * most


def test_a_file_of_nothing_but_mistakes_is_answered_shortly(monkeypatch: pytest.MonkeyPatch):
    explained = []
    monkeypatch.setattr(config, "did_you_mean", lambda name, known: explained.append(name) or "")
    with pytest.raises(InvalidDocument) as error:
        parse_yaml("".join(f"k{number}: 1\n" for number in range(9000)), "my.yaml").parse(
            Outer, known_options=lambda at: Outer.model_fields
        )
    lines = str(error.value).splitlines()
    assert len(lines) == len(error.value.problems) == MAX_PROBLEMS + 1 and len(explained) <= MAX_PROBLEMS
    assert any("more mistakes; is this the right file?" in line for line in lines)
    doubled = problems("name: x\n" * 1000)
    assert len(doubled) == MAX_PROBLEMS + 1 and "and 949 more mistakes" in "".join(doubled)


@pytest.mark.parametrize("digits", ["1" + "0" * 23, "0x" + "f" * 40, "-" + "9" * 30])
def test_an_integer_that_no_tensor_holds_is_refused(digits: str):
    assert "inner.sizes[1]: must be between -9,223,372,036,854,775,807 and" in "".join(
        problems(f"name: x\ninner: {{sizes: [1, {digits}]}}\n")
    )
    assert "it has thousands of digits" in "".join(problems("name: " + "9" * 5000))
    with pytest.raises(InvalidDocument, match=r"an integer of \d+ bits"):
        Document({"name": "x", "inner": {"budget": 10**5000}}, "options").parse(Outer)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_file_in_another_encoding_is_refused_with_its_line(encoding: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_bytes("name: x\n# é\n".encode(encoding))
    with pytest.raises(ConfigError) as error:
        read_yaml(file).parse(Outer)
    assert "save it as UTF-8" in str(error.value) or "U+0000" in str(error.value)


def test_a_long_key_or_tag_is_cut():
    for text in ("? " + "x" * 100000 + "\n: 1\nname: x\n", "name: !" + "a" * 100000 + " x\n"):
        assert all(len(line) < 200 for line in problems(text))


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
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        read_yaml(big)
    with pytest.raises(ConfigError, match=r"binary\.yaml:1: not UTF-8 text"):
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
