"""Text after a special token has no blank that belongs to the very beginning only (Metaspace tokenizers: Llama 2, Mistral)."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loopserve.models.chat import ChatTokenizer
from tests.faults.chat_tokens import byte_tokenizer, fed_and_whole
from tests.models.chat_cases import A, U

WORDS = ["<unk>", "<s>", "</s>", "▁", "▁user", "user", "▁hi", "hi", "▁assistant", "assistant", "▁yes", "yes", ":", "▁:"]


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram([(word, -10.0 + len(word) / 10) for word in WORDS], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}assistant:"
    return tokenizer


@pytest.mark.parametrize("scheme", ["first", "never", "always"])
def test_text_after_a_special_token_is_encoded_in_its_place(scheme: str) -> None:
    fed, whole = fed_and_whole(metaspace(scheme), [U("hi"), A("yes"), U("hi")])
    assert fed == whole


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_special_token_that_strips_white_space_does_so(side: str) -> None:
    template = "{% for m in messages %}<|x|> {{ m['content'] }} <|y|>\n{% endfor %}<|x|>\n"
    tokenizer = byte_tokenizer(template, ())
    for token in ("<|x|>", "<|y|>"):
        tokenizer.add_tokens([AddedToken(token, special=True, **{side: True})], special_tokens=True)
    fed, whole = fed_and_whole(tokenizer, [U("hi")])
    assert fed == whole
    messages = [U("  <|x|> typed <|y|>  ")]
    chat = ChatTokenizer(tokenizer)
    stripped = {tokenizer.convert_tokens_to_ids(token) for token in ("<|x|>", "<|y|>")}
    assert sum(token in stripped for token in chat.turn_tokens(messages, None)) == 3


@pytest.mark.parametrize(
    ("single", "wanted"), [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("<s> <s> $A", [1, 1])]
)
def test_without_a_template_the_tokenizers_own_prefix_is_added_and_no_other(single: str, wanted: list[int]) -> None:
    tokenizer = metaspace("first")
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = ChatTokenizer(tokenizer).turn_tokens([U("hi")], None)
    assert ids == [*wanted, tokenizer.convert_tokens_to_ids("▁hi")]
