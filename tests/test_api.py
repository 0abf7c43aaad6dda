"""A person's conversation with the bundled model: what is said, taken back, tried twice, broken off, saved."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loopserve import Engine, LoopServeError, load_stack
from loopserve.chat_session import ChatSession
from loopserve.core.errors import ConfigError, InputError, ModelError
from loopserve.models.demo import bundled_path

TOLD = "the code of lisbon is amber falcon river . we had soup for lunch today . the code of oslo is silver lantern ."
QUESTION = "what is the code of oslo ?"
STACKS = ["dense", "loopserve", "snapkv", "snapkv-evict"]


@pytest.fixture(scope="module", params=STACKS)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.from_pretrained("demo", stack=request.param)


@pytest.fixture
def chat(engine: Engine) -> Iterator[ChatSession]:
    with engine.session() as session:
        yield session


def test_facts_stated_are_recalled_over_turns(chat: ChatSession) -> None:
    assert chat.send(f"{TOLD} what is the code of oslo ?").text == "oslo is silver lantern ."
    reply = chat.send("what is the code of lisbon ?")
    assert reply.text == "lisbon is amber falcon river ."
    assert reply.usage.reused_tokens > reply.usage.prompt_tokens
    assert reply.usage.completion_tokens == len(reply.token_ids)
    assert reply.timings.ttft_ms > 0 and reply.timings.tpot_ms > 0


def test_a_stream_gives_the_text_of_the_reply(chat: ChatSession) -> None:
    pieces = list(chat.stream(f"{TOLD} what is the code of oslo ?"))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == chat.last_reply.text


def test_undo_takes_a_turn_back_whole(chat: ChatSession) -> None:
    chat.send(f"{TOLD} what is the code of oslo ?")
    before = (list(chat.messages), list(chat._session.tokens), chat._session.cache.seen)
    first = chat.send("what is the code of lisbon ?")
    assert chat.undo()["content"] == "what is the code of lisbon ?"
    assert (list(chat.messages), list(chat._session.tokens), chat._session.cache.seen) == before
    assert chat.send("what is the code of lisbon ?").token_ids == first.token_ids


def test_retry_gives_the_same_greedy_answer(chat: ChatSession) -> None:
    chat.send(f"{TOLD} what is the code of oslo ?")
    assert chat.retry().text == "oslo is silver lantern ."
    assert len(chat.turns) == 1


def test_a_fork_does_not_touch_its_origin(chat: ChatSession) -> None:
    chat.send(f"{TOLD} what is the code of oslo ?")
    other = chat.fork()
    other.send("the code of quito is stone maple . what is the code of quito ?")
    assert len(chat.messages) == 2 and len(other.messages) == 4
    assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."


def test_a_stream_left_early_takes_its_turn_back(chat: ChatSession) -> None:
    chat.send(f"{TOLD} what is the code of oslo ?")
    tokens = list(chat._session.tokens)
    stream = chat.stream("what is the code of lisbon ?")
    next(stream)
    stream.close()
    assert chat._session.tokens == tokens and len(chat.messages) == 2
    assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."


def test_a_stream_left_at_its_last_piece_takes_its_turn_back(chat: ChatSession) -> None:
    stream = chat.stream(f"{TOLD} what is the code of oslo ?", max_new_tokens=1)
    next(stream)
    stream.close()
    assert chat.messages == [] and chat.turns == []


def test_a_second_turn_cannot_begin_while_an_answer_is_being_written(chat: ChatSession) -> None:
    stream = chat.stream(f"{TOLD} what is the code of oslo ?")
    next(stream)
    for attempt in (lambda: chat.send("hello"), chat.undo, chat.fork):
        with pytest.raises(InputError, match=r"still being written|nothing to undo"):
            attempt()
    rest = "".join(stream)
    assert rest and len(chat.messages) == 2
    assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."


def test_streams_opened_together_are_answered_in_the_order_they_are_read(chat: ChatSession) -> None:
    first, second = chat.stream(f"{TOLD} what is the code of lisbon ?"), chat.stream(QUESTION)
    list(first)
    list(second)
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == [
        f"{TOLD} what is the code of lisbon ?",
        QUESTION,
    ]
    assert len(chat.turns) == 2 and "silver lantern" in chat.messages[-1]["content"]
    assert chat.undo()["content"] == QUESTION
    assert len(chat.messages) == 2 and len(chat.turns) == 1


def test_a_turn_that_breaks_off_under_eviction_leaves_the_last_one_to_be_taken_back() -> None:
    with Engine.from_pretrained("demo", "snapkv-evict").session() as chat:
        chat.send(f"{TOLD} what is the code of lisbon ?")
        chat.send(QUESTION)
        stream = chat.stream(QUESTION)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert chat.undo()["content"] == QUESTION
        assert len(chat.messages) == 2 and chat.send(QUESTION).text == "oslo is silver lantern ."


def test_a_closed_session_frees_its_cache(engine: Engine) -> None:
    with engine.session() as session:
        session.send(f"{TOLD} what is the code of oslo ?")
        held = weakref.ref(session._session)
    gc.collect()
    assert held() is None


def test_a_word_that_repeats_the_end_of_the_answer_is_kept(engine: Engine) -> None:
    with engine.session() as session:
        session.send(f"{TOLD} what is the code of oslo ?", max_new_tokens=2)  # cut off after "oslo is"
        before = len(session._session.tokens)
        session.send("is it so ?", max_new_tokens=1)
        said = session.engine.tokenizer.decode(session._session.tokens[before:])
    assert said.startswith("is it so ?")


def test_a_retry_that_breaks_off_keeps_the_old_answer(chat: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    old = chat.send(f"{TOLD} what is the code of oslo ?")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.engine.token_engine.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.retry()
    monkeypatch.undo()
    assert chat.last_reply is old and len(chat.messages) == 2 and len(chat.turns) == 1
    assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."


def test_ctrl_c_in_mid_answer_keeps_the_last_complete_turn(chat: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.send(f"{TOLD} what is the code of oslo ?")
    real, calls = chat.engine.token_engine.model.forward, []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(chat.engine.token_engine.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.send("what is the code of lisbon ?")
    monkeypatch.undo()
    assert len(chat.messages) == 2
    assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."


def test_interleaved_conversations_equal_solo_ones(engine: Engine) -> None:
    texts = [[f"{TOLD} what is the code of {city} ?", "what is the code of lisbon ?"] for city in ("oslo", "lisbon")]
    solo = []
    for said in texts:
        with engine.session() as chat:
            solo.append([chat.send(text).token_ids for text in said])
    chats = [engine.session(), engine.session()]
    mixed: list[list[tuple[int, ...]]] = [[], []]
    for turn in range(2):
        for number, chat in enumerate(chats):
            mixed[number].append(chat.send(texts[number][turn]).token_ids)
    assert mixed == solo


def test_a_saved_conversation_goes_on(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with engine.session() as chat:
        chat.send(f"{TOLD} what is the code of oslo ?")
        chat.save(file)
        wanted = chat.send("what is the code of lisbon ?").text
    with engine.load_session(file) as chat:
        assert chat.send("what is the code of lisbon ?").text == wanted
    assert json.loads(file.read_text())["messages"][0]["role"] == "user"


def test_what_is_no_conversation_is_refused(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    for roles in (["user", "user"], ["assistant", "user"], ["user"]):
        said = [{"role": role, "content": "a b c"} for role in roles]
        file.write_text(json.dumps({"version": 1, "messages": said}))
        with pytest.raises(ConfigError, match="not turns of user and assistant"):
            engine.load_session(file)
    for wrong in (None, 5, b"x"):
        with engine.session() as chat, pytest.raises(InputError, match="a message is text, not"):
            chat.send(wrong)  # type: ignore[arg-type]
    for system in (5, "\ud800"):
        with pytest.raises(InputError, match="system message is no text"):
            engine.session(system)  # type: ignore[arg-type]
    for spec in (None, 1, []):
        with pytest.raises(ConfigError, match="a stack is a preset's name"):
            load_stack(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "a"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: "),
        ([{"role": "human", "content": "a"}], r"messages\[0\]: role 'human' is not known"),
        (["hello"], r"messages\[0\] is a dictionary"),
        ({}, "messages are a list"),
        (None, "messages are a list"),
    ],
)
def test_messages_that_are_no_text_are_named(engine: Engine, tmp_path: Path, messages: Any, says: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"version": 1, "messages": messages}))
    with pytest.raises(ConfigError, match=says):
        engine.load_session(file)


def test_a_file_that_holds_something_else_is_refused(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    for text in ("", "[]", "5", "null", "{}", '{"version": 1', "\x00", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ConfigError, match="not a saved conversation"):
            engine.load_session(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a saved conversation"):
        engine.load_session(file)


def test_turns_of_a_loaded_conversation_can_be_taken_back(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with engine.session() as chat:
        first = chat.send(f"{TOLD} what is the code of oslo ?").text
        second = chat.send("what is the code of lisbon ?").text
        chat.save(file)
    with engine.load_session(file) as chat:
        assert chat.retry().text == second  # a turn that is not computed yet
        chat.send("what is the code of oslo ?")
        taken = [chat.undo()["content"] for _ in range(3)]
        assert taken == [
            "what is the code of oslo ?",
            "what is the code of lisbon ?",
            f"{TOLD} what is the code of oslo ?",
        ]
        assert chat.messages == []
        with pytest.raises(InputError, match="nothing to undo"):
            chat.undo()
        assert chat.send(f"{TOLD} what is the code of oslo ?").text == first
    with engine.load_session(file) as chat:
        chat.undo()
        assert chat.send("what is the code of lisbon ?").text == second
        assert len(chat.messages) == 4


def test_a_retry_whose_stream_is_closed_keeps_the_old_answer(engine: Engine) -> None:
    with engine.session() as chat:
        chat.send(f"{TOLD} what is the code of oslo ?")
        messages = list(chat.messages)
        pieces = chat.stream_retry()
        next(iter(pieces))
        pieces.close()  # type: ignore[attr-defined]
        assert chat.messages == messages
        assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."


def test_a_conversation_goes_on_from_messages_held_elsewhere(engine: Engine) -> None:
    held = [
        {"role": "user", "content": f"{TOLD} what is the code of oslo ?"},
        {"role": "assistant", "content": "unknown"},
    ]
    with engine.session(messages=held) as chat:
        assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."
    with pytest.raises(InputError, match="not turns of user and assistant"):
        engine.session(messages=held[:1])
    with pytest.raises(InputError, match="leave system out"):
        engine.session("be kind", messages=[{"role": "system", "content": "be brief"}, *held])


def test_the_prefill_says_how_far_it_is() -> None:
    engine = Engine.from_pretrained("demo", stack="dense", chunk_tokens=16)
    seen: list[tuple[int, int]] = []
    with engine.session() as chat:
        for _ in chat.stream("hello " * 40, progress=lambda done, total: seen.append((done, total)), max_new_tokens=2):
            pass
        total = chat.last_reply.usage.prompt_tokens if chat.last_reply else 0
    assert seen[0] == (0, total) and len(seen) == -(-total // 16)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_full_disk_does_not_cost_the_conversation_saved_before(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "talk.json"
    with engine.session() as chat:
        chat.send(f"{TOLD} what is the code of oslo ?")
        chat.save(file)
        before = file.read_bytes()
        chat.send("what is the code of lisbon ?")

        def full(*arguments: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(InputError, match=r"No space left on device\); what the file held before is unchanged"):
            chat.save(file)
        monkeypatch.undo()
    assert file.read_bytes() == before


def test_bad_requests_are_one_line_and_lose_nothing(chat: ChatSession) -> None:
    chat.send(f"{TOLD} what is the code of oslo ?")
    for text, options, says in [
        ("   ", {}, "empty"),
        ("word " * 20_000, {}, "tokens long, the model takes"),
        ("hi", {"max_new_tokens": 0}, "max_new_tokens: Input should be greater than 0"),
        ("hi", {"temperature": float("nan")}, "temperature"),
        ("hi", {"max_new_tokens": 10**6}, "does not fit"),
        ("hi", {"top_q": 1}, "unknown sampling option 'top_q'; did you mean 'top_p'"),
        ("\udcff", {}, "no text"),
    ]:
        with pytest.raises((InputError, ConfigError), match=says) as caught:
            chat.send(text, **options)
        assert "\n" not in str(caught.value)
    assert chat.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."


def test_a_closed_session_says_so(engine: Engine) -> None:
    chat = engine.session()
    chat.close()
    with pytest.raises(InputError, match="closed"):
        chat.send("hello")


@pytest.mark.parametrize("damage", ["truncate", "garbage", "missing"])
def test_a_corrupt_weight_file_is_one_clear_error(damage: str, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(bundled_path(), broken)
    weights = broken / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "garbage":
        weights.write_bytes(b"not weights at all")
    else:
        weights.unlink()
    with pytest.raises(ModelError, match=r"cannot load model .*safetensors") as caught:
        Engine.from_pretrained(str(broken), stack="dense")
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(bundled_path(), broken)
    tensors = {name: each for name, each in load_file(broken / "model.safetensors").items() if ".layers.0." not in name}
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its weights lack model\.layers\.0\."):
        Engine.from_pretrained(str(broken), stack="dense")


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_not_there_is_one_clear_error(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' is unknown or not there"):
        Engine.from_pretrained("demo", stack="dense", device=device)


def test_a_chunk_of_no_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens must be at least 1"):
        Engine.from_pretrained("demo", stack="dense", chunk_tokens=0)


def test_an_unknown_model_is_one_clear_error() -> None:
    with pytest.raises(LoopServeError, match="cannot load model '/nowhere/at/all'"):
        Engine.from_pretrained("/nowhere/at/all", stack="dense")


def test_a_stack_is_given_by_name_path_or_dict(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nprefill: {policy: dense}\ndecode: {policy: snapkv, budget: 64}\n")
    for stack in ("snapkv", file, str(file), {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}):
        loaded = load_stack(stack)
        assert load_stack(loaded) is loaded
