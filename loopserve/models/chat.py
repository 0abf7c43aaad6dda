"""Turn messages into the tokens of a conversation, and the tokens of an answer into its text. Depends on no model.

The template is rendered with the real contents and encoded by the tokenizer. Earlier answers keep the model's own tokens wherever
the template leaves their text unchanged. A message that contains ``<|im_end|>`` stays plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from loopserve.core.errors import InputError, ModelError
from loopserve.models.answers import CHANNEL, Answer, Piece, split_answer
from loopserve.models.encoding import Encoder
from loopserve.models.messages import TOOLS, Message, check_messages
from loopserve.models.template import View, view
from loopserve.models.tool_calls import GENERIC, ToolFormat, spelled_out, strings_of, tool_format, with_strings

_TOKEN_MARK = "\ufdd0"  # before a special token within the text of an answer; a noncharacter, which no text contains


@dataclass(frozen=True)
class Prompt:
    """Hold the prompt of a turn: its rendering and its tokens.

    tokens: empty if they were dropped to save memory. history: number of tokens before the last messages, if the tokens can be
    split there.
    """

    text: str
    tokens: tuple[int, ...]
    history: int | None = None


@dataclass(frozen=True)
class Answered:
    """Hold an answer that the model gave. message: its index in the conversation. tokens: with the token that ended it."""

    message: int
    prompt: Prompt
    answer: Answer
    tokens: tuple[int, ...] = field(repr=False)


class ChatTokenizer:
    """Wrap a tokenizer of transformers with its chat template. The tokenizer itself is never changed."""

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = ()) -> None:
        """Read the template's stop tokens. stop_ids: further tokens that end an answer."""
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self.tool_format: ToolFormat | None = tool_format(getattr(tokenizer, "chat_template", None))
        unknown = getattr(tokenizer, "unk_token_id", None)  # stands for text that has no token; never shown
        self._special = {index: text for index, text in self._encoder.special.items() if index != unknown}
        own = {tokenizer.eos_token_id} - {None}
        self.stop_ids: frozenset[int] = frozenset(own | set(stop_ids) | self._template_stop())
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        self._ending = self.stop_ids | {getattr(tokenizer, name, None) for name in names} - {None}
        self._frame = self._ending | self._frame_ids()

    # A conversation.

    def prompt(self, messages: Sequence[Message], answered: Sequence[Answered] = ()) -> Prompt:
        """Return the tokens of a whole conversation, the generation prompt included.

        answered: the answers among the messages whose own tokens are known, in order. Each answers the messages before it. Raises
        InputError for messages that cannot be answered, ModelError if the template refuses them.
        """
        check_messages(messages)
        if self.tokenizer.chat_template is None:
            return self._bare_prompt(messages, answered)
        rendering, kept = self._view_with(messages, answered)
        ids: list[int] = []
        cursor = 0
        for entry, start, end in reversed(kept):
            if (
                entry.prompt.tokens
                and start == rendering.at(len(entry.prompt.text))
                and rendering.clean(0, start) == entry.prompt.text
            ):
                ids, cursor = [*entry.prompt.tokens, *entry.answer.tokens], end
                break
        for entry, start, end in kept:
            if start >= cursor and end > cursor:
                ids += self._encode(rendering, cursor, start) + list(entry.answer.tokens)
                cursor = end
        history = None
        last = max(rendering.answers.values(), key=lambda place: place[1], default=None)
        if last is not None and last[1] >= cursor and self._encoder.begins_with_special(rendering.text[last[1] :]):
            ids += self._encode(rendering, cursor, last[1])
            history, cursor = len(ids), last[1]
        ids += self._encode(rendering, cursor, None)
        if not ids:
            raise ModelError("the model's chat template renders nothing of this conversation")
        return Prompt(rendering.clean(), tuple(ids), history)

    def turn_tokens(self, messages: Sequence[Message], last_token: int | None) -> list[int]:
        """Return the ids of ``turn_prompt``."""
        return list(self.turn_prompt(messages, last_token).tokens)

    def turn_prompt(self, messages: Sequence[Message], last_token: int | None) -> Prompt:
        """Return what the messages after the last answer add, the generation prompt included: text and ids of that part alone.

        messages: the whole conversation, a user's message at its end. last_token: the last token of the conversation so far, so
        that an end-of-turn token that the model produced is not added twice.
        """
        check_messages(messages)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.tokenizer.chat_template is None:
            texts = "\n".join(message["content"] for message in messages[answers[-1] + 1 if answers else 0 :])
            return Prompt(texts, (*(() if answers else self._encoder.prefix), *self._plain(texts)))
        if not answers:
            return self.prompt(messages)
        standing = list(messages)
        last = {
            key: text for key, text in standing[answers[-1]].items() if key != "tool_calls"
        }  # they follow the content
        standing[answers[-1]] = (
            last if last["content"].strip() else {**last, "content": "."}
        )  # that needs a place as well
        rendering = self._view(standing, answers[-1:])
        if answers[-1] not in rendering.answers:
            raise ModelError(
                "the model's chat template drops earlier answers or changes them; it is served through ChatSession only"
            )
        end = rendering.answers[answers[-1]][1]
        ids = self._encode(rendering, end, None)
        kept = ids[1:] if last_token is not None and ids[:1] == [last_token] else ids
        return Prompt(rendering.clean(end), tuple(kept))

    def text_tokens(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text without template; what looks like a special token stays text. special: with the tokens that
        begin every text of the model.
        """
        return [*(self._encoder.prefix if special else ()), *self._plain(text)]

    def answer_tokens(self, text: str) -> list[int]:
        """Return the ids of an answer from elsewhere, as it continues a prompt. Its end-of-turn token comes with the next turn.

        Special tokens within it are those that ``decode`` has marked. Other text that looks like one stays text.
        """
        ids: list[int] = []
        for part in re.split(f"({_TOKEN_MARK}(?:{'|'.join(map(re.escape, self._by_length()))}))", text):
            if part.startswith(_TOKEN_MARK) and part[1:] in self._ids_by_text:
                ids.append(self._ids_by_text[part[1:]])
            else:
                ids += self._plain(part, continued=True)
        return ids

    def answer_end(self, stop_ids: frozenset[int]) -> int | None:
        """Return the stop token that the template writes after an answer; None if it writes none there."""
        end = self._end
        return end if end in stop_ids else None

    # An answer.

    def read_answer(self, ids: Sequence[int], opened: str = "", *, over: bool = True) -> Answer:
        """Return an answer's text and its reasoning. opened: the text of the prompt. over: the answer is complete."""
        core = list(ids)
        while core and core[-1] in self._ending:
            core.pop()
        pieces = self._pieces(core)
        text, reasoning = split_answer(pieces, opened, over=over)
        return Answer(text, reasoning, "".join(text for _, text in pieces), tuple(core))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without the template's tokens at their ends; ``answer_tokens`` restores the tokens.

        Special tokens within the text are preceded by a mark (U+FDD0). Use ``read_answer`` for text to display.
        """
        core = list(ids)
        while core and core[-1] in self._frame:
            core.pop()
        while core and core[0] in self._frame:
            del core[0]
        return "".join(_TOKEN_MARK + text if special else text for special, text in self._pieces(core))

    def _pieces(self, ids: Sequence[int]) -> list[Piece]:
        if not any(index in self._special for index in ids):
            return [(False, self._encoder.decode(ids))] if ids else []
        pieces: list[Piece] = []
        for special, group in groupby(ids, key=lambda index: index in self._special):
            run = list(group)
            pieces += (
                [(True, self._special[index]) for index in run] if special else [(False, self._encoder.decode(run))]
            )
        return pieces

    # Rendering.

    def _view_with(
        self, messages: Sequence[Message], answered: Sequence[Answered]
    ) -> tuple[View, list[tuple[Answered, int, int]]]:
        """Return the rendering, and the places of the model's answers that it contains unchanged.

        If an answer contains reasoning or special tokens, the template first gets the whole text. If it refuses or changes that
        text, it gets the answer's parts.
        """
        wrapped = [number for number, message in enumerate(messages) if message["role"] == "assistant"][-1:]
        wrapped = sorted({*wrapped, *(entry.message for entry in answered)})
        given = list(messages)
        for entry in answered:
            given[entry.message] = {"role": "assistant", "content": entry.answer.raw.strip()}
        parted = [entry for entry in answered if entry.answer.raw.strip() != messages[entry.message]["content"].strip()]
        try:
            rendering = self._view(given, wrapped)
        except (ModelError, InputError):
            if not parted:
                raise
            rendering = None
        changed = [entry for entry in parted if rendering is None or _place(rendering, entry) is None]
        if changed:
            for entry in changed:
                given[entry.message] = messages[entry.message]
            rendering = self._view(given, wrapped)
        assert rendering is not None
        return rendering, [(entry, *place) for entry in answered if (place := _place(rendering, entry)) is not None]

    def _view(self, messages: Sequence[Message], wrapped: Iterable[int]) -> View:
        thoughts = [number for number, message in enumerate(messages) if "reasoning_content" in message]
        parsed: dict[int, Any] = {
            number: json.loads(message["content"] if message["role"] == TOOLS else message["tool_calls"])
            for number, message in enumerate(messages)
            if message["role"] == TOOLS or "tool_calls" in message
        }
        texts = ["" if message["role"] == TOOLS else message["content"] for message in messages]
        texts += [messages[n]["reasoning_content"] for n in thoughts]
        texts += [text for value in parsed.values() for text in strings_of(value)]

        def render(texts: Sequence[str]) -> str:
            given: list[dict[str, Any]] = [
                {**message, "content": text} for message, text in zip(messages, texts, strict=False)
            ]
            rest = iter(texts[len(messages) :])
            for number in thoughts:
                text = next(rest)
                given[number] |= {"reasoning_content": text, "thinking": text}  # templates use either name
            for number, value in parsed.items():
                given[number]["tool_calls"] = with_strings(value, rest)
            return self._render(given)

        return view(render, texts, wrapped, self._encoder.typed, self._encoder.first_characters)

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        tools = None
        if messages[0]["role"] == TOOLS:
            tools, messages = messages[0]["tool_calls"], messages[1:]
        if self.tool_format is GENERIC:
            messages, tools = spelled_out(messages, tools), None
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template raises concerns its roles
            raise ModelError(f"the model's chat template refuses this conversation: {error}") from error
        return rendered

    def _bare_prompt(self, messages: Sequence[Message], answered: Sequence[Answered]) -> Prompt:
        """Join the texts of a conversation for a model without template."""
        own = {entry.message: entry.tokens for entry in answered}
        ids, texts, before = list(self._encoder.prefix), [], ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                texts.append(message["content"])
                continue
            ids += self._plain("\n".join(texts))
            before, texts = before + "\n".join(texts) + message["content"], []
            ids += own[number] if number in own else self._plain(message["content"], continued=True)
        history = len(ids) if any(message["role"] == "assistant" for message in messages) else None
        return Prompt(before + "\n".join(texts), (*ids, *self._plain("\n".join(texts))), history)

    # Tokens.

    def _encode(self, rendering: View, start: int, end: int | None) -> list[int]:
        return self._encoder.encode(rendering.text[start:end], rendering.mark, continued=start > 0)

    def _plain(self, text: str, *, continued: bool = False) -> list[int]:
        """Return the ids of text in which nothing is a special token."""
        rendering = view(lambda contents: contents[0], [text], [], self._encoder.typed, self._encoder.first_characters)
        return self._encoder.encode(rendering.text, rendering.mark, continued=continued)

    def _by_length(self) -> list[str]:
        return sorted(self._ids_by_text, key=len, reverse=True)

    @cached_property
    def _ids_by_text(self) -> dict[str, int]:
        return {text: index for index, text in self._special.items()}

    def _template_stop(self) -> set[int]:
        """Return the token that the template ends an answer with, unless it can stand within one as well."""
        self._end = self._find_end()
        within = CHANNEL in str(getattr(self.tokenizer, "chat_template", None))
        return set() if self._end is None or within else {self._end}

    def _find_end(self) -> int | None:
        """Return the special token that the template writes after an answer, with or without white space before it."""
        exchange = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]
        if getattr(self.tokenizer, "chat_template", None) is None:
            return None
        try:
            after = self.turn_tokens(exchange, None)
        except (ModelError, InputError):
            return None
        before: list[int] = []
        for token in after:
            if token in self._special:
                return token if not self._encoder.decode(before).strip() else None
            before.append(token)
        return None

    def _frame_ids(self) -> set[int]:
        """Return the special tokens that the template writes around messages."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            return set()
        try:
            return set(self.turn_tokens([{"role": "user", "content": "."}], None)) & self._special.keys()
        except (ModelError, InputError):
            return set()


def _place(rendering: View, entry: Answered) -> tuple[int, int] | None:
    """Return the place of an answer in a rendering, if the template kept the model's text.

    White space at its ends is ignored. The place begins where the prompt ended, if only white space lies between.
    """
    if entry.message not in rendering.answers:
        return None
    begin, end = rendering.answers[entry.message]
    raw, prompt = entry.answer.raw.strip(), entry.prompt.text
    if rendering.clean(0, end).startswith(prompt) and rendering.clean(0, end)[len(prompt) :].strip() == raw:
        return rendering.at(len(prompt)), end
    return (begin, end) if rendering.clean(begin, end).strip() == raw else None
