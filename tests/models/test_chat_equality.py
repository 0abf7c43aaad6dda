"""A conversation has the tokens that the tokenizer's own rendering of it has, over tokenizers and templates."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.core.errors import InputError, ModelError
from loopserve.models.chat import Answered, ChatTokenizer, Prompt
from loopserve.models.messages import Message
from tests.models.chat_cases import KINDS, SPECIAL, TEMPLATES, A, S, U, tokenizer

MAY_REFUSE = ("harmony", "escaped json", "gemma", "last only")
BOTH = [(kind, template) for kind in KINDS for template in TEMPLATES]
CHATS = {both: ChatTokenizer(tokenizer(*both)) for both in BOTH}
WORDS = [
    "hi",
    "yes",
    " ",
    "\n",
    "  ",
    "<",
    "|",
    "/no_think",
    "</think>",
    '"',
    "x",
    "é",
    ":",
    "assistant",
    "<think>",
    "[",
]
PLAIN = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("".join)
TYPED = st.lists(st.sampled_from([*WORDS, *SPECIAL, "</s>", "<s>", "[inst]"]), min_size=1, max_size=6).map("".join)


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    said = texts.filter(lambda text: text.strip())
    pairs = st.lists(st.tuples(said, said), max_size=3)
    return st.tuples(st.none() | said, pairs, said).map(
        lambda parts: [
            *([] if parts[0] is None else [S(parts[0])]),
            *(message for user, answer in parts[1] for message in (U(user), A(answer))),
            U(parts[2]),
        ]
    )


def own(chat: ChatTokenizer, messages: list[Message]) -> list[int]:
    ids: list[int] = chat.tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(template=st.sampled_from(list(TEMPLATES)), messages=conversations(PLAIN))
def test_tokens_are_those_of_the_tokenizers_own_rendering(kind: str, template: str, messages: list[Message]) -> None:
    chat = CHATS[kind, template]
    try:
        wanted = own(chat, messages)
    except Exception as refused:
        with pytest.raises(ModelError, match="refuses this conversation"):
            chat.prompt(messages)
        if template != "gemma":
            raise AssertionError("only one of the templates refuses anything") from refused
        return
    if not wanted:
        return
    assert list(chat.prompt(messages).tokens) == wanted


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(template=st.sampled_from(list(TEMPLATES)), messages=conversations(TYPED))
def test_typed_special_tokens_stay_text(kind: str, template: str, messages: list[Message]) -> None:
    chat = CHATS[kind, template]
    special = chat._encoder.special.keys() - {chat.tokenizer.unk_token_id}
    try:
        wanted = own(chat, [{**each, "content": _tame(each["content"])} for each in messages])
    except Exception:
        return
    try:
        found = chat.prompt(messages).tokens
    except (InputError, ModelError) as refused:  # refused by name, never let through
        if template in MAY_REFUSE:
            return
        raise AssertionError("this template leaves a special token's text as it is") from refused
    assert [each for each in found if each in special] == [each for each in wanted if each in special]


def _tame(text: str) -> str:
    """The text without special tokens; what a template looks for in it stays."""
    for token in [*SPECIAL, "[inst]", "<s>", "</s>"]:
        text = text.replace(token, "q" * len(token))
    return text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(template=st.sampled_from(list(TEMPLATES)), messages=conversations(PLAIN))
def test_answers_keep_their_own_tokens_where_the_template_leaves_them(
    kind: str, template: str, messages: list[Message]
) -> None:
    chat = CHATS[kind, template]
    if messages[0]["role"] == "system":
        messages = messages[1:]
    answered: list[Answered] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = chat.prompt(messages[:number], answered)
        # One token per character, as no encoder would choose them: a model may.
        pieces = [chat.answer_tokens(character) for character in message["content"]]
        tokens = tuple(token for piece in pieces for token in piece)
        answer = chat.read_answer(tokens, prompt.text)
        messages[number] = A(answer.text.strip())
        answered.append(Answered(number, prompt, answer, tokens))
    found = chat.prompt(messages, answered)
    for entry in answered:
        _check_kept(template, entry, found)


def _check_kept(template: str, entry: Answered, found: Prompt) -> None:
    raw = entry.answer.raw.strip()
    begun = entry.prompt.text
    if not raw or template in ("harmony", "last only"):
        return  # they never leave an answer as it is
    if not found.text.startswith(begun) or not found.text[len(begun) :].lstrip().startswith(raw):
        return  # the template has changed it
    start = len(entry.prompt.tokens)
    assert found.tokens[:start] == entry.prompt.tokens
    assert found.tokens[start : start + len(entry.answer.tokens)] == entry.answer.tokens
