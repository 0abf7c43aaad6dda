"""Docstrings and comments use the field's words: imperative docstrings, no metaphors."""

from __future__ import annotations

import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("loopserve", "plugins") for path in (ROOT / folder).rglob("*.py"))
# Not the field's words, or metaphors where a plain term exists.
WORDS = re.compile(r"\b(house|room|told|wish|wishes|aside|harms)\b")
DATA = {
    "loopserve/bench/recall.py",
    "loopserve/bench/vocabulary.py",
}  # words of the dialogues that the model was trained on


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_comments_are_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    assert [each.partition("\n")[0] for each in docstrings if each.startswith("What ")] == []
    if str(path.relative_to(ROOT)) in DATA:
        return
    with path.open("rb") as file:
        comments = [each.string for each in tokenize.tokenize(file.readline) if each.type == tokenize.COMMENT]
    prose = "\n".join([*docstrings, *comments])
    assert [match.group() for match in WORDS.finditer(prose)] == []
