"""From messages to the token ids that one more turn adds. Earlier turns are never tokenised again.

The template is rendered with stand-ins for what people wrote; special tokens are looked for in the template's own text only, so
a message that contains ``<|im_end|>`` stays plain text. Knows no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from loopserve.core.errors import InputError, ModelError

Message = dict[str, str]
_STAND_IN = "\ue000{}\ue001"
_ANY_STAND_IN = re.compile("\ue000(\\d+)\ue001")


class ChatTokenizer:
    """A tokenizer of transformers with its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile(
            "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)"
        )

    @property
    def stop_ids(self) -> frozenset[int]:
        end = self.tokenizer.eos_token_id
        return frozenset() if end is None else frozenset({end})

    def turn_tokens(self, messages: Sequence[Message], last_token: int | None) -> list[int]:
        """Ids that the last message (a user's) adds, the generation prompt included.

        messages: the whole conversation. last_token: the last token the conversation holds so far, so that an end-of-turn token
        that the model produced itself is not added twice.
        """
        if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
            raise InputError("the message is empty: write something")
        if not writable(messages[-1]["content"]):
            raise InputError("the message holds bytes that are no text; send it as UTF-8")
        if any("\ue000" in message["content"] or "\ue001" in message["content"] for message in messages):
            raise InputError("the message contains the private characters U+E000 or U+E001; remove them")
        ids = self._encode(self._new_text(messages), messages)
        if last_token is not None and ids and ids[0] == last_token:
            ids = ids[1:]
        return ids

    def _new_text(self, messages: Sequence[Message]) -> str:
        """Template text after the last answer, with stand-ins for contents."""
        answered = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if self.tokenizer.chat_template is None:
            start = 0 if answered is None else answered + 1
            text = "\n".join(_STAND_IN.format(n) for n in range(start, len(messages)))
            return text if answered is not None else (self.tokenizer.bos_token or "") + text
        stand_ins = [{"role": m["role"], "content": _STAND_IN.format(n)} for n, m in enumerate(messages)]
        try:
            rendered: str = self.tokenizer.apply_chat_template(stand_ins, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises is about its roles
            raise ModelError(f"the model's chat template refuses this conversation: {error}") from error
        if answered is None:
            return rendered
        _, found, rest = rendered.partition(_STAND_IN.format(answered))
        if not found:
            raise ModelError(
                "the model's chat template drops earlier answers; multi-turn chat with it is not supported"
            )
        return rest

    def _encode(self, text: str, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in self._special.finditer(text):
            ids += self._plain(text[end : match.start()], messages)
            ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
            end = match.end()
        return ids + self._plain(text[end:], messages)

    def _plain(self, text: str, messages: Sequence[Message]) -> list[int]:
        """Ids of text without special tokens, its stand-ins replaced by what people wrote."""
        text = _ANY_STAND_IN.sub(lambda match: messages[int(match.group(1))]["content"], text)
        if not text:
            return []
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def answer_tokens(self, text: str) -> list[int]:
        """Ids of an answer given elsewhere; its end-of-turn token comes with the next turn."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def answer_end(self, stop_ids: frozenset[int]) -> int | None:
        """The stop token that the template writes behind an answer; None if it writes none there."""
        exchange = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]
        after = self.turn_tokens(exchange, None)
        return after[0] if after[0] in stop_ids else None

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def writable(text: str) -> bool:
    """False for lone surrogates, which stand for bytes that were no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class StreamDecoder:
    """Text pieces of an answer as its tokens arrive; a character that is not complete yet waits."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._said = ""

    def push(self, token: int) -> str:
        """The text that one more token adds; may be empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids).rstrip("\ufffd")
        if not text.startswith(self._said):
            return ""
        piece = text[len(self._said) :]
        self._said = text
        return piece

    def rest(self) -> str:
        """What still waits when the answer is over: a character cut off in its middle."""
        return self._tokenizer.decode(self._ids).removeprefix(self._said)
