"""The text of an answer as its tokens arrive: whole characters, up to a stop string, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from loopserve.core.engine.sampling import ChosenLogprob
from loopserve.models.answer_text import AnswerText
from loopserve.models.answers import Answer
from loopserve.models.chat import ChatTokenizer
from loopserve.models.logprobs import TokenBytes, token_logprobs
from tests.core.test_stop_strings import first_stop
from tests.models.test_chat import CHAT, byte_tokenizer


class Pieces(ChatTokenizer):
    """Tokens that are any bytes at all."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.tokenizer = SimpleNamespace(added_tokens_decoder={})

    def decode(self, ids: object) -> str:
        return b"".join(self.pieces[each] for each in ids).decode(errors="replace")  # type: ignore[attr-defined]

    def read_answer(self, ids: Sequence[int], opened: str = "", *, over: bool = True) -> Answer:
        text = self.decode(ids)
        return Answer(text, None, text, tuple(ids))


@given(
    st.text("ab é漢😀", max_size=20),
    st.lists(st.text("ab é漢😀", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 60), max_size=20),
)
def test_an_answer_ends_at_its_stop_string_however_its_bytes_are_split(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    raw = text.encode()
    ends = sorted({min(cut, len(raw)) for cut in cuts} | {len(raw)})
    starts = [0, *ends[:-1]]
    pieces = [raw[start:end] for start, end in zip(starts, ends, strict=True)]
    wanted, stop = first_stop(text, stops)
    answer, given, used = AnswerText(Pieces(pieces), stops), "", 0
    for token in range(len(pieces)):
        used += 1
        found = answer.push(token)
        given += answer.take()
        assert wanted.startswith(given)
        if found is not None:
            assert found == stop
            break
    answer.close()
    assert (given + answer.take(), answer.text, answer.stop_string) == (wanted, wanted, stop)
    if stop is not None:  # no token is taken in after the one that completes the stop string
        last = len((wanted + stop).encode())
        assert starts[used - 1] < last <= ends[used - 1]


def test_a_character_cut_off_at_the_end_of_an_answer_is_shown() -> None:
    answer = AnswerText(Pieces([b"ab\xf0\x9f"]), ["b!"])
    assert answer.push(0) is None and answer.take() == "a"
    answer.close()
    assert answer.take() == "b\ufffd" and answer.text == "ab\ufffd"


def test_a_special_token_can_be_a_stop_string() -> None:
    answer = AnswerText(CHAT, ["<|im_start|>"])
    a, start = CHAT.answer_tokens("a")[0], CHAT.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert answer.push(a) is None and answer.push(start) == "<|im_start|>"
    answer.close()
    assert answer.text == "a" and answer.stop_string == "<|im_start|>"


def test_logprobs_say_text_and_bytes() -> None:
    first, second = CHAT.answer_tokens("é")
    end = CHAT.tokenizer.convert_tokens_to_ids("<|im_end|>")
    chosen = [ChosenLogprob(first, -0.5, ((first, -0.5), (end, -1.5))), ChosenLogprob(second, -0.1, ())]
    found = token_logprobs(CHAT, chosen)
    assert [each.bytes for each in found] == [b"\xc3", b"\xa9"] and found[0].token == "\ufffd"
    assert [(each.token, each.bytes, each.logprob) for each in found[0].top][1] == ("<|im_end|>", b"<|im_end|>", -1.5)


@given(st.text(max_size=20))
def test_the_bytes_of_byte_level_tokens_make_up_the_text(text: str) -> None:
    found = TokenBytes(ChatTokenizer(byte_tokenizer()))
    assert b"".join(found.of(token) for token in CHAT.answer_tokens(text)) == text.encode()
    assert found.of(100_000) == b""


def test_sentencepiece_tokens_have_their_spaces_and_bytes() -> None:
    core = Tokenizer(models.BPE(vocab={"\u2581oslo": 0, "<0xE2>": 1}, merges=[]))
    inner = SimpleNamespace(
        added_tokens_decoder={}, backend_tokenizer=core, convert_ids_to_tokens=["\u2581oslo", "<0xE2>"].__getitem__
    )
    found = TokenBytes(SimpleNamespace(tokenizer=inner))  # type: ignore[arg-type]
    assert found.of(0) == b" oslo" and found.of(1) == b"\xe2"
