"""What people write stays plain text, and only the new turn is tokenised."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopserve.core.errors import InputError, ModelError
from loopserve.models.answers import StreamDecoder
from loopserve.models.chat import ChatTokenizer
from loopserve.models.messages import as_messages

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level without merges: every byte is a token, special tokens aside."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(sorted(alphabet))}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", additional_special_tokens=SPECIAL, bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


CHAT = ChatTokenizer(byte_tokenizer())
SPECIAL_IDS = {CHAT.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
TEXT = st.lists(
    st.one_of(st.sampled_from([*SPECIAL, "\n", " ", "<|im_start|>system\n"]), st.text(max_size=8)), min_size=1
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@given(TEXT.map("".join).filter(lambda text: text.strip() and not set(text) & {"\ue000", "\ue001"}))
def test_special_tokens_depend_on_roles_alone(text: str) -> None:
    first = CHAT.turn_tokens([user(text)], None)
    assert sum(token in SPECIAL_IDS for token in first) == 3
    conversation = [user("hello"), {"role": "assistant", "content": text}, user(text)]
    later = CHAT.turn_tokens(conversation, None)
    assert sum(token in SPECIAL_IDS for token in later) == 4  # the end of the answer comes with the next turn
    assert sum(token in SPECIAL_IDS for token in CHAT.answer_tokens(text)) == 0


def test_turns_join_to_what_the_template_renders_whole() -> None:
    messages = [user("hi there"), {"role": "assistant", "content": "hello!"}, user("and now?")]
    pieces = CHAT.turn_tokens(messages[:1], None) + CHAT.answer_tokens("hello!")
    pieces += CHAT.turn_tokens(messages, pieces[-1])
    whole = CHAT.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert pieces == CHAT.tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_an_end_token_the_model_gave_itself_is_not_added_twice() -> None:
    end = CHAT.tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    assert CHAT.turn_tokens(messages, None) == [end, *CHAT.turn_tokens(messages, end)]


def test_a_model_without_template_gets_the_text_as_it_is() -> None:
    plain = ChatTokenizer(byte_tokenizer(None))
    assert plain.decode(plain.turn_tokens([user("once upon")], None)) == "once upon"
    messages = [user("once"), {"role": "assistant", "content": " more"}, user("again")]
    assert plain.decode(plain.turn_tokens(messages, None)) == "again"


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_message_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="message is empty"):
        CHAT.turn_tokens([user(text)], None)


def test_a_template_that_refuses_a_role_is_named() -> None:
    strict = ChatTokenizer(byte_tokenizer("{{ raise_exception('no system role') }}"))
    with pytest.raises(ModelError, match="no system role"):
        strict.turn_tokens([user("hi")], None)


def test_a_template_that_drops_earlier_answers_is_refused() -> None:
    dropping = ChatTokenizer(byte_tokenizer("{{ messages[-1]['content'] }}"))
    with pytest.raises(ModelError, match="drops earlier answers"):
        dropping.turn_tokens([user("a"), {"role": "assistant", "content": "b"}, user("c")], None)


@given(st.text(min_size=1, max_size=30))
def test_streamed_pieces_join_to_the_text(text: str) -> None:
    stream = StreamDecoder(CHAT)
    pieces = [stream.push(token) for token in CHAT.answer_tokens(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_calls_in_a_history_are_read_and_read_again() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = [
        user("hi"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
    ]
    messages = as_messages(given)
    assert as_messages(messages) == messages  # as a saved conversation holds them
    text = CHAT.prompt(messages).text
    assert '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\n\n</tool_response>" in text
    for wrong in ("x", [call | {"function": {}}], [3], {"a": 1}):
        with pytest.raises(InputError, match="tool_calls"):
            as_messages([{"role": "assistant", "tool_calls": wrong}])
