"""Special tokens within an answer (channels, markers of tool calls) stay apart from its text, and survive save and load."""

from __future__ import annotations

import pytest

from loopserve.models.chat import ChatTokenizer
from tests.faults.chat_tokens import byte_tokenizer
from tests.models.chat_cases import tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<|endoftext|>", "<|tool|>", "<|/tool|>")
ANALYSIS = "<|channel|>analysis<|message|>hmm<|im_end|><|im_start|>assistant"


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer(byte_tokenizer(special=SPECIAL))


@pytest.mark.parametrize(
    ("written", "text", "reasoning"),
    [
        (f"{ANALYSIS}<|channel|>final<|message|>Hi", "Hi", "hmm"),
        (f"{ANALYSIS}<|channel|>commentary to=f<|message|>x<|im_end|><|channel|>final<|message|>Hi", "Hi", "hmm\nx"),
        ("<|channel|>final<|message|>Hi", "Hi", None),
        ("<|channel|>analysis<|message|>cut off", "", "cut off"),
        ('See <|tool|>{"a": 1}<|/tool|>', 'See <|tool|>{"a": 1}<|/tool|>', None),
        ("<think>\nhmm\n</think>\n\nHi", "Hi", "hmm"),
        ("<think>never closed", "", "never closed"),
        ("I <think> so", "I <think> so", None),
        ("<th", "<th", None),
    ],
)
def test_channels_and_markers_stay_apart(chat: ChatTokenizer, written: str, text: str, reasoning: str | None) -> None:
    tokens = chat.tokenizer(written, add_special_tokens=False)["input_ids"]
    answer = chat.read_answer([*tokens, chat.tokenizer.eos_token_id])
    assert (answer.text, answer.reasoning, list(answer.tokens)) == (text, reasoning, tokens)
    kept = chat.decode(tokens).strip()
    assert chat.answer_tokens(kept) == tokens and not kept.startswith("analysis")


def test_a_prompt_that_opened_the_reasoning_is_heeded(chat: ChatTokenizer) -> None:
    tokens = chat.tokenizer("hmm</think>Hi", add_special_tokens=False)["input_ids"]
    answer = chat.read_answer(tokens, "<|im_start|>assistant\n<think>\n")
    assert (answer.text, answer.reasoning) == ("Hi", "hmm")


def test_an_unknown_word_is_no_marker() -> None:
    chat = ChatTokenizer(tokenizer("metaspace first", "chatml"))
    ids = chat.answer_tokens("hi\u4e2dyes")
    assert chat.tokenizer.unk_token_id in ids
    assert chat.decode(ids) == chat.read_answer(ids).text == "hiyes"
