"""Make an answer follow a JSON schema or the form of a tool call, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loopserve.api import Engine
from loopserve.models.answers import REASONING_BLOCKS
from loopserve.models.tool_calls import ToolFormat
from loopserve.serve.errors import ApiError, invalid

# JSON as json.dumps writes it. Free white space lets a small model write nothing else until its limit.
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_SCHEMA_BYTES = 256 << 10


@dataclass(frozen=True)
class Grammar:
    """Hold what an answer must be."""

    text: str = field(repr=False)
    grammars: Grammars = field(repr=False)

    def processor(self, opened: str) -> Constraint:
        """Return the logits processor of one answer. opened: the prompt's text, which may have opened a reasoning block."""
        after = next((end for begin, end in REASONING_BLOCKS if opened.rstrip().endswith(begin)), None)
        return Constraint(self.grammars.matcher(self.text), after, self.grammars.decode)


class Constraint:
    """Forbid every token that leaves the grammar. Reasoning that the template has opened is free up to its end."""

    def __init__(self, matcher: Any, after: str | None, decode: Callable[[Sequence[int]], str]) -> None:
        self._matcher, self._after, self._decode = matcher, after, decode
        self._start: int | None = None
        self._taken: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores ``[1, V]`` in which only tokens that the grammar allows are finite."""
        if self._start is None:
            self._start = input_ids.shape[1]
        answer = input_ids[0, self._start :].tolist()
        if self._after is not None:
            if self._after not in self._decode(answer):
                return scores
            self._after, self._start = None, input_ids.shape[1]
            answer = []
        if answer[: len(self._taken)] != self._taken:  # the turn was computed anew
            self._matcher.reset()
            self._taken = []
        self._matcher.consume_tokens(answer[len(self._taken) :])
        self._taken = answer
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).to(scores.device)
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        size = min(len(bias), len(allowed))
        allowed[:size] = bias[:size] > 0
        if self._matcher.is_error() or not allowed.any():
            raise ApiError(500, f"the answer cannot go on in the form that was asked for: {self._matcher.get_error()}")
        return scores.masked_fill(~allowed, float("-inf"))


class Grammars:
    """Make grammars for the tokenizer of an engine, from any thread. Nothing is loaded before the first is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def answer(
        self, schema: Mapping[str, Any] | None, known: ToolFormat | None, tools: Sequence[Mapping[str, Any]], param: str
    ) -> Grammar:
        """Return the grammar of an answer: JSON that a schema allows, or a call of one of the tools; given both, either.

        Blocks while it is compiled. ApiError (400) names what is wrong with a schema.
        """
        rules: dict[str, str] = {}
        if schema is not None:
            rules["json"] = f"%json {_compact(schema, param)}"
        if tools and known is not None:
            if schema is not None and known.bare:
                raise invalid(
                    f"{param}: this model's tool calls are JSON as well: ask for one of tools and a schema", param
                )
            rules |= _call_rules(known, tools, param)
        first = [name for name in ("json", "call") if name in rules]
        lines = [f"start: {' | '.join(first)}", *(f"{name}: {rule}" for name, rule in rules.items())]
        return self._checked("\n".join(lines), param)

    def matcher(self, text: str) -> Any:
        """Return a new matcher of a grammar."""
        library, tokenizer = self._load()
        return library.LLMatcher(tokenizer, text, log_level=0)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._engine.tokenizer.read_answer(ids).raw

    def _checked(self, lark: str, param: str) -> Grammar:
        library, tokenizer = self._load()
        text = library.LLMatcher.grammar_from_lark(lark)
        wrong, notes = library.LLMatcher.validate_grammar_with_warnings(text, tokenizer)
        if wrong:
            raise invalid(f"{param}: the schema cannot be followed: {_reason(notes[0])}", param)
        return Grammar(text, self)

    def _load(self) -> tuple[Any, Any]:
        with self._lock:
            if self._loaded is None:
                try:
                    import llguidance
                except ImportError as error:
                    raise ApiError(
                        501, "answers of a given form need the package llguidance: pip install 'loopserve[serve]'"
                    ) from error
                engine = self._engine
                core = getattr(engine.tokenizer.tokenizer, "backend_tokenizer", None)
                if core is None:
                    raise ApiError(501, "answers of a given form need a tokenizer of the tokenizers library")
                vocabulary = max(engine.token_engine.model.vocabulary, core.get_vocab_size(with_added_tokens=True))
                try:
                    tokenizer = llguidance.LLTokenizer(
                        core.to_str(), n_vocab=vocabulary, eos_token=sorted(engine.stop_ids)
                    )
                except ValueError as error:
                    raise ApiError(
                        501, f"answers of a given form cannot be made with this tokenizer: {error}"
                    ) from error
                self._loaded = llguidance, tokenizer
            return self._loaded


def _compact(schema: Mapping[str, Any], param: str) -> str:
    text = json.dumps({**schema, "x-guidance": _JSON})
    if len(text) > MAX_SCHEMA_BYTES:
        raise invalid(f"{param}: the schema is longer than {MAX_SCHEMA_BYTES} bytes", param)
    return text


def _call_rules(known: ToolFormat, tools: Sequence[Mapping[str, Any]], param: str) -> dict[str, str]:
    """Return the rules of one call in the form that a template knows."""
    rules, bodies = {}, []
    for number, tool in enumerate(tools):
        function = tool["function"]
        parameters = {"type": "object", **(function.get("parameters") or {})}
        name = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{known.arguments}": ')
        rules[f"arguments{number}"] = f"%json {_compact(parameters, param)}"
        bodies.append(f'{name} arguments{number} "}}"')
    before, after = (json.dumps(text) if text else "" for text in (known.before, known.after))
    if known.name == "mistral":
        before, after = f'<{known.begin}> "["', '"]"'
    return {"call": f"{before} body {after}".strip(), "body": " | ".join(bodies), **rules}


def _reason(note: str) -> str:
    note = note.partition("\n   1 |")[0]
    return " ".join(note.partition("JSON schema: ")[2].split() or note.split())[:500]
