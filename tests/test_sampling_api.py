"""Sampling options in a conversation: where an answer ends and why, what is reported, whose defaults, whose errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import RepetitionPenaltyLogitsProcessor

from loopserve import ChatSession, ConfigError, Engine, InputError, ModelError
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.forward import ForwardBatch
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.scheduler import Scheduler
from loopserve.models.answer_text import AnswerText

FACTS = "the code of lisbon is amber falcon river . we had soup for lunch today . the code of oslo is silver lantern ."
ASKED = f"{FACTS} what is the code of oslo ?"
ANSWER = "oslo is silver lantern ."
NEXT = "what is the code of lisbon ?"


@pytest.fixture(scope="module", params=["dense", "loopserve", "snapkv-evict"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.from_pretrained("demo", stack=request.param)


@pytest.fixture(scope="module")
def dense() -> Engine:
    return Engine.from_pretrained("demo", stack="dense")


@pytest.fixture
def chat(engine: Engine) -> Iterator[ChatSession]:
    with engine.session() as session:
        yield session


def test_an_answer_says_why_it_ended(chat: ChatSession) -> None:
    reply = chat.send(ASKED)
    assert (reply.text, reply.finish_reason, reply.stop_string) == (ANSWER, "stop", None)
    assert reply.token_ids[-1] in chat.engine.stop_ids and reply.logprobs is None
    reply = chat.retry(max_new_tokens=2)
    assert (reply.text, reply.finish_reason) == ("oslo is", "length")


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("silver", "oslo is", 3),
        ("ver lan", "oslo is sil", 4),
        ([" is", "lantern"], "oslo", 2),
        (["ilv", "silver"], "oslo is s", 3),
        ("oslo", "", 1),
        ("nowhere", ANSWER, 6),
    ],
)
def test_a_stop_string_ends_the_answer_before_it(chat: ChatSession, stop: Any, text: str, tokens: int) -> None:
    pieces = list(chat.stream(ASKED, stop=stop))
    reply = chat.last_reply
    assert reply is not None
    assert "".join(pieces).strip() == reply.text == text and len(reply.token_ids) == tokens
    assert reply.stop_string == (None if stop == "nowhere" else stop if isinstance(stop, str) else stop[0])
    assert reply.finish_reason == "stop" and chat.messages[-1]["content"] == text
    session = chat._session
    assert session is not None and tuple(session.tokens[-tokens:]) == reply.token_ids
    assert chat.send(NEXT).text == "lisbon is amber falcon river ."
    chat.undo()
    assert chat.undo()["content"] == ASKED and chat.send(ASKED).text == ANSWER


def test_a_piece_that_is_held_back_comes_at_the_end(chat: ChatSession) -> None:
    pieces = list(chat.stream(ASKED, stop="lantern . and"))
    assert "".join(pieces).strip() == ANSWER and "lantern ." in pieces[-1]
    stream = chat.stream(ASKED, stop="lantern . and")
    for piece in stream:
        if "lantern" in piece:
            break
    stream.close()  # type: ignore[attr-defined]
    assert len(chat.messages) == 2


def test_the_stop_tokens_can_be_ignored(chat: ChatSession) -> None:
    reply = chat.send(ASKED, ignore_eos=True, max_new_tokens=12)
    assert reply.finish_reason == "length" and len(reply.token_ids) == 12
    assert reply.token_ids[5] in chat.engine.stop_ids


def test_an_answer_may_reach_the_end_of_the_window_unless_its_length_was_asked_for(
    dense: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = len(dense.tokenizer.turn_tokens([{"role": "user", "content": ASKED}], None))
    monkeypatch.setattr(type(dense.token_engine.model), "max_positions", needed + 3)
    with dense.session() as chat:
        reply = chat.send(ASKED)
        assert (reply.text, reply.finish_reason) == ("oslo is silver", "length")
        with pytest.raises(InputError, match="tokens long, the model takes"):
            chat.send(NEXT)
        with pytest.raises(InputError, match=r"max_new_tokens=4 does not fit: 3 tokens are left"):
            chat.retry(max_new_tokens=4)
        assert chat.last_reply is reply
    engine, session = dense.token_engine, dense.token_engine.session()
    logits = engine.prefill(session, dense.tokenizer.turn_tokens([{"role": "user", "content": ASKED}], None))
    with pytest.raises(InputError, match="does not fit"):
        list(engine.decode(session, logits, SamplingConfig(max_new_tokens=4)))
    assert len(list(engine.decode(session, logits, SamplingConfig()))) == 3


def test_logprobs_are_reported_per_token(chat: ChatSession) -> None:
    reply = chat.send(ASKED, logprobs=True, top_logprobs=2)
    assert reply.logprobs is not None and len(reply.logprobs) == len(reply.token_ids)
    assert " ".join(each.token for each in reply.logprobs[:-1]) == ANSWER
    for each, token in zip(reply.logprobs, reply.token_ids, strict=True):
        assert each.token_id == token == each.top[0].token_id and each.logprob == each.top[0].logprob <= 0
        assert each.top[0].logprob >= each.top[1].logprob and each.bytes == each.token.encode()
    assert all(each.top == () for each in chat.retry(logprobs=True).logprobs or ())


def test_bias_and_processors_change_the_answer(chat: ChatSession) -> None:
    silver = chat.send(ASKED).token_ids[2]
    assert "silver" not in chat.retry(logit_bias={silver: -100}).text

    def forbid(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.shape[0] == 1 and input_ids[0].tolist() == chat._session.tokens  # type: ignore[union-attr]
        scores[:, silver] = -math.inf
        return scores

    reply = chat.retry(logits_processors=[forbid])
    assert "silver" not in reply.text and reply.finish_reason == "stop"
    theirs = chat.retry(logits_processors=[RepetitionPenaltyLogitsProcessor(1.5)])
    assert theirs.token_ids == chat.retry(repetition_penalty=1.5).token_ids
    assert list(chat.stream(NEXT, logits_processors=[forbid]))


def test_an_error_of_a_processor_takes_its_turn_back(chat: ChatSession) -> None:
    first = chat.send(ASKED)

    def broken(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("no such vowel")

    with pytest.raises(InputError, match="logits processor broken raised ZeroDivisionError: no such vowel"):
        chat.send(NEXT, logits_processors=[broken])
    assert chat.last_reply is first and len(chat.messages) == 2
    assert chat.send(NEXT).text == "lisbon is amber falcon river ."


@pytest.fixture
def own(dense: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1, eos_token_id=2
    )
    monkeypatch.setattr(dense.model, "generation_config", config)
    return dense


def test_the_models_own_options_are_taken_where_asked(own: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}
    assert own.sampling_config({}) == SamplingConfig()
    assert own.sampling_config({"sampling": "model", "seed": 3}) == SamplingConfig(**wanted, seed=3)
    assert own.sampling_config({"sampling": "model", "top_k": 0}).top_k == 0
    engine = Engine(own.model, own.tokenizer.tokenizer, "dense", sampling="model")
    assert engine.sampling_config({}).temperature == 0.6
    assert engine.sampling_config({"sampling": "default"}) == SamplingConfig()
    drawn = [engine.session().send(ASKED, seed=1).token_ids for _ in range(2)]
    assert drawn[0] == drawn[1] == own.session().send(ASKED, seed=1, sampling="model").token_ids
    monkeypatch.setattr(own.model, "generation_config", GenerationConfig(temperature=0.6, top_k=20))
    assert own.sampling_config({"sampling": "model"}).greedy
    monkeypatch.setattr(own.model, "generation_config", GenerationConfig(do_sample=True))
    assert own.sampling_config({"sampling": "model"}) == SamplingConfig(temperature=1.0)


def test_what_a_model_says_wrong_and_what_is_no_source_are_named(own: Engine) -> None:
    own.model.generation_config.top_p = 3.0
    with pytest.raises(ConfigError, match="the model's generation_config: top_p: "):
        own.session().send(ASKED, sampling="model")
    with pytest.raises(ConfigError, match="sampling: unknown 'models'; did you mean 'model'"):
        own.session().send(ASKED, sampling="models")
    with pytest.raises(ConfigError, match="sampling: unknown 'greedy'"):
        Engine(own.model, own.tokenizer.tokenizer, "dense", sampling="greedy")  # type: ignore[arg-type]


def prompts(engine: Engine) -> list[list[int]]:
    cities = ("oslo", "lisbon", "oslo")
    texts = [f"{FACTS} " * (1 + number) + f"what is the code of {city} ?" for number, city in enumerate(cities)]
    return [engine.tokenizer.turn_tokens([{"role": "user", "content": text}], None) for text in texts]


def together(engine: TokenEngine, given: list[list[int]], options: list[dict[str, Any]]) -> list[Any]:
    """Run the turns of several sessions in shared passes; the results are the requests."""
    scheduler = Scheduler(engine, max_batched_tokens=24)
    requests = [
        scheduler.submit(engine.session(), ids, SamplingConfig(max_new_tokens=8, **each))
        for ids, each in zip(given, options, strict=True)
    ]
    scheduler.run()
    return requests


def test_a_seeded_answer_is_the_same_whatever_is_in_the_batch(engine: Engine) -> None:
    core, given = engine.token_engine, prompts(engine)
    options: list[dict[str, Any]] = [
        {"temperature": 1.5, "seed": 7, "logprobs": True},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": True},
        {"temperature": 2.0, "seed": 8, "min_p": 0.01, "top_k": 40},
    ]
    alone = [list(core.generate(core.session(), *each)) for each in zip(given, map(_eight, options), strict=True)]
    for order in itertools.permutations(range(3)):
        found = together(core, [given[each] for each in order], [options[each] for each in order])
        assert [request.output for request in found] == [alone[each] for each in order]
        assert all(request.turn.finish_reason == "length" for request in found)
        reported = found[order.index(0)].turn.logprobs
        assert [each.token_id for each in reported] == alone[0] and found[order.index(2)].turn.logprobs is None


def _eight(options: dict[str, Any]) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=8, **options)


@pytest.mark.parametrize(("value", "says"), [(math.nan, "not numbers"), (-math.inf, "all -inf")])
def test_logits_that_are_no_numbers_end_one_turn_alone(
    dense: Engine, monkeypatch: pytest.MonkeyPatch, value: float, says: str
) -> None:
    core, given = dense.token_engine, prompts(dense)
    alone = [request.output for request in together(core, given, [{}] * 3)]
    real = core.model.forward
    victim = len(given[1])

    def damaged(batch: ForwardBatch) -> torch.Tensor:
        logits = real(batch).clone()
        for row, context in zip(logits, batch.contexts, strict=True):
            if len(context.session.tokens) == victim + 3:
                row.fill_(value)
        return logits

    monkeypatch.setattr(core.model, "forward", damaged)
    requests = together(core, given, [{}] * 3)
    with pytest.raises(ModelError, match=says):
        requests[1].result()
    assert requests[1].session.tokens == [] and requests[1].session.turns == []
    assert [requests[0].result(), requests[2].result()] == [alone[0], alone[2]]


def test_stop_strings_work_for_several_sessions_in_a_pass(dense: Engine) -> None:
    core, given = dense.token_engine, prompts(dense)
    scheduler = Scheduler(core, max_batched_tokens=24)
    stops = ["lantern", "con ri", "is"]
    texts = [AnswerText(dense.tokenizer, [stop]) for stop in stops]
    requests = [
        scheduler.submit(core.session(), ids, SamplingConfig(stop=stop), dense.stop_ids, stop_check=text.push)
        for ids, stop, text in zip(given, stops, texts, strict=True)
    ]
    scheduler.run()
    for text in texts:
        text.close()
    assert [text.text.strip() for text in texts] == ["oslo is silver", "lisbon is amber fal", "oslo"]
    assert [each.turn.stop_string for each in requests if each.turn] == stops
    with pytest.raises(ConfigError, match="the engine of tokens knows no text"):
        core.begin(core.session(), given[0], SamplingConfig(stop="is"))
