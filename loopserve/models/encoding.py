"""Encode text with the template's own special tokens. Text that people typed never becomes a special token.

All work is done on copies of the tokenizer whose settings never change, so that threads can share a tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from loopserve.core.errors import InputError, ModelError

_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"  # delimit the private names of special tokens


class Encoder:
    """Encode and decode like a tokenizer of transformers, without changing it.

    A mark is a character inside every part of a text that must not become a special token. It is removed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        contents = {index: str(token) for index, token in added.items() if token.special}
        for token in tokenizer.all_special_tokens:
            contents.setdefault(int(tokenizer.convert_tokens_to_ids(token)), str(token))
        self.special: dict[int, str] = contents
        self._unknown = getattr(tokenizer, "unk_token_id", None)
        self._pattern = re.compile(
            "|".join(re.escape(text) for text in sorted(set(contents.values()), key=len, reverse=True)) or r"(?!)"
        )
        core = getattr(tokenizer, "backend_tokenizer", None)
        self._exact: Tokenizer | None = None
        self._normalizes = False
        if isinstance(core, Tokenizer):
            self._exact = Tokenizer.from_str(_serialized(core))
            self._exact.no_truncation()
            self._exact.no_padding()
            self._exact.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
            self._normalizes = self._exact.normalizer is not None and any(
                token.normalized for token in added.values() if token.special
            )

    # Text to tokens.

    def encode(self, text: str, mark: str = "", *, continued: bool = False) -> list[int]:
        """Return the ids of a text. Special tokens without a mark inside become their ids.

        continued: the text continues other tokens, so no blank is put before its first word. Raises InputError if the tokenizer
        cannot keep the text of a special token as text.
        """
        if not text:
            return []
        if self._exact is None:
            return self._slowly(text, mark)
        if continued:
            start = next((start for _, start, _ in self._specials(text)), len(text))
            return self._plain(_unmarked(text[:start], mark)) + self.encode(text[start:], mark)
        clean = _unmarked(text, mark)
        encoded = self._exact.encode(clean, add_special_tokens=False)
        if clean == text:
            return list(encoded.ids)
        wanted = self._specials(text)
        if [index for index, _, _ in self._found(encoded, clean)] == [index for index, _, _ in wanted]:
            return list(encoded.ids)
        if _OPEN in clean:
            raise InputError(
                "the conversation holds the text of a special token and the character U+10FFF0; remove one of them"
            )
        pieces, end = [], 0
        for index, start, stop in wanted:
            pieces += [_unmarked(text[end:start], mark), _private(index)]
            end = stop
        return self._mapped("".join([*pieces, _unmarked(text[end:], mark)]), self._renamed)

    def begins_with_special(self, text: str) -> bool:
        """Return whether the first token of a text is a special one that strips no white space before it."""
        if self._exact is None:
            return self._pattern.match(text) is not None
        head = text[: 4 * max((len(each) for each in self.special.values()), default=0)]
        first = self._specials(head)[:1]
        return bool(first) and first[0][1] == 0 and not text[0].isspace()

    def typed(self, text: str) -> list[int]:
        """Return the offsets at which special tokens begin in a text that people wrote."""
        if self._normalizes:
            return [start for _, start, _ in self._specials(text)]
        return [match.start() for match in self._pattern.finditer(text)]

    @cached_property
    def first_characters(self) -> frozenset[str]:
        """Return the characters with which special tokens begin."""
        return frozenset(text[0] for text in self.special.values() if text)

    @cached_property
    def prefix(self) -> list[int]:
        """Return the ids that the tokenizer itself puts before a text: none, BOS, or more."""
        sample = "a"
        if self._exact is not None:
            bare = self._exact.encode(sample, add_special_tokens=False).ids
            whole = self._exact.encode(sample, add_special_tokens=True).ids
        else:
            bare = self._tokenizer(sample, add_special_tokens=False)["input_ids"]
            whole = self._tokenizer(sample)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if list(whole[start : start + len(bare)]) == list(bare):
                return list(whole[:start])
        return []

    # Tokens to text.

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of tokens. special: keep special tokens as their text."""
        tokenizer = self._tokenizer
        if self._exact is None:
            slow: str = tokenizer.decode(list(ids), skip_special_tokens=not special)
            return slow
        text = self._exact.decode(list(ids), skip_special_tokens=not special)
        if getattr(tokenizer, "clean_up_tokenization_spaces", False) and type(self._exact.model).__name__ != "BPE":
            text = tokenizer.clean_up_tokenization(text)
        return text

    # Special tokens in an encoding.

    def _specials(self, text: str) -> list[tuple[int, int, int]]:
        """Return (id, start, end) of the special tokens that the tokenizer sees in a text."""
        assert self._exact is not None
        return self._found(self._exact.encode(text, add_special_tokens=False), text)

    def _found(self, encoded: Encoding, text: str) -> list[tuple[int, int, int]]:
        return [
            (index, start, end)
            for index, (start, end) in zip(encoded.ids, encoded.offsets, strict=True)
            if index in self.special
            and (index != self._unknown or text[start:end].strip().casefold() == self.special[index].casefold())
        ]

    def _slowly(self, text: str, mark: str) -> list[int]:
        if mark and mark in text and (typed := self._pattern.search(_unmarked(text, mark))):
            found = len(self._pattern.findall(_unmarked(text, mark)))
            if found != len(self._pattern.findall(text)):
                raise InputError(
                    f"the message contains the text of a special token ({typed.group()!r} or another one), which the model's "
                    "tokenizer cannot keep as text; remove it"
                )
        ids: list[int] = self._tokenizer(_unmarked(text, mark), add_special_tokens=False)["input_ids"]
        return list(ids)

    # Copies whose special tokens have private names, so that their usual text is plain text.

    def _plain(self, text: str) -> list[int]:
        return self._mapped(text, self._continuing) if text else []

    def _mapped(self, text: str, copy: tuple[Tokenizer, dict[int, int]]) -> list[int]:
        tokenizer, ids = copy
        return [ids.get(index, index) for index in tokenizer.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[int, int]]:
        return self._with_private_names(continuing=False)

    @cached_property
    def _continuing(self) -> tuple[Tokenizer, dict[int, int]]:
        return self._with_private_names(continuing=True)

    def _with_private_names(self, *, continuing: bool) -> tuple[Tokenizer, dict[int, int]]:
        """Return a copy and a map from its ids to those of the tokenizer. continuing: nothing is put before the first word."""
        assert self._exact is not None
        described = json.loads(self._exact.to_str())
        names = {text: _private(index) for index, text in self.special.items()}
        added = sorted(described["added_tokens"], key=lambda token: int(token["id"]))
        _rename_pieces(described["model"], names)
        described |= {"added_tokens": [], "post_processor": None}
        if continuing:
            described["normalizer"] = _without_prefix(described["normalizer"])
            described["pre_tokenizer"] = _without_prefix(described["pre_tokenizer"])
        tokenizer = Tokenizer.from_str(json.dumps(described))
        ids = {}
        for token in added:
            name = names.get(token["content"], token["content"])
            private = name != token["content"]
            flags = {each: token[each] for each in ("lstrip", "rstrip")}
            flags |= {each: token[each] and not private for each in ("single_word", "normalized")}
            entry = AddedToken(name, special=private, **flags)
            if private:
                tokenizer.add_special_tokens([entry])
            else:
                tokenizer.add_tokens([entry])
            index = tokenizer.token_to_id(name)
            if index is None:
                raise ModelError(f"the tokenizer's added token {token['content']!r} cannot be copied")
            ids[index] = int(token["id"])
        return tokenizer, ids


def _serialized(core: Tokenizer) -> str:
    """Return a tokenizer as JSON. Retry if another thread changes its settings at the same time."""
    for _ in range(1000):
        try:
            return core.to_str()
        except RuntimeError:
            continue
    return core.to_str()


def _private(index: int) -> str:
    return f"{_OPEN}{index}{_CLOSE}"


def _unmarked(text: str, mark: str) -> str:
    return text.replace(mark, "") if mark else text


def _rename_pieces(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give the special tokens in a model's vocabulary their private names, so that no text is encoded as one."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        pairs = [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in model["merges"]]
        model["merges"] = [
            list(pair) for pair in pairs if not names.keys() & {*pair, "".join(pair)}
        ]  # a merge that builds a special token would restore it


def _without_prefix(node: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer that puts no blank before the first word."""
    if node is None or node.get("type") == "Prepend":
        return None
    node = dict(node)
    if node["type"] == "Metaspace":
        node["prepend_scheme"] = "never"
        node.pop("add_prefix_space", None)
    elif "add_prefix_space" in node:
        node["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in node:
            node[key] = [kept for each in node[key] if (kept := _without_prefix(each)) is not None]
    return node
