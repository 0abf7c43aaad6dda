"""A byte-level tokenizer, and the tokens of a conversation as loopserve feeds it turn by turn beside the template's own."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopserve.models.chat import ChatTokenizer
from loopserve.models.messages import Message
from tests.models.chat_cases import CHATML


def byte_tokenizer(
    template: str = CHATML, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        additional_special_tokens=list(special),
        bos_token="<|endoftext|>",
    )
    tokenizer.chat_template = template
    return tokenizer


def fed_and_whole(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> tuple[list[str], list[str]]:
    """Return the tokens that loopserve feeds over the turns, and those of ``apply_chat_template``."""
    chat, fed = ChatTokenizer(tokenizer), list[int]()
    for end, message in enumerate(messages, 1):
        if message["role"] == "user":
            fed += chat.turn_tokens(messages[:end], fed[-1] if fed and fed[-1] in chat.stop_ids else None)
        elif message["role"] == "assistant":
            fed += chat.answer_tokens(message["content"])
    whole = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    return tokenizer.convert_ids_to_tokens(fed), tokenizer.convert_ids_to_tokens(whole)
