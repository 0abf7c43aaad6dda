"""Many chat sessions in shared passes, at once and from an event loop: each answers as it would alone."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from loopserve import Engine, InputError, PolicyFault
from loopserve.models.loading import load

TEXTS = ("Paris is where Mary went", "the cat sat on the mat " * 30, "hello")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*load("demo"), "snapkv")


def alone(engine: Engine, *texts: str, stack: str | None = None) -> list[str]:
    with engine.session(stack=stack) as chat:
        return [chat.send(text, max_new_tokens=8).text for text in texts]


def test_a_batch_answers_as_each_session_alone(engine: Engine) -> None:
    chats = [engine.session() for _ in TEXTS]
    for turn in range(2):
        replies = engine.batch(zip(chats, TEXTS, strict=True), max_new_tokens=8, max_sessions=2)
        assert [reply.text for reply in replies] == [alone(engine, *[text] * (turn + 1))[-1] for text in TEXTS]
    assert [len(chat.messages) for chat in chats] == [4, 4, 4]
    assert chats[0].undo()["content"] == TEXTS[0]


def test_sessions_under_different_stacks_are_answered_together(engine: Engine) -> None:
    chats = [engine.session(stack=name) for name in ("dense", "loopserve", "snapkv")]
    replies = engine.batch([(chat, TEXTS[1]) for chat in chats], max_new_tokens=8)
    expected = [alone(engine, TEXTS[1], stack=name)[0] for name in ("dense", "loopserve", "snapkv")]
    assert [reply.text for reply in replies] == expected
    assert [chat.fork().stack.name for chat in chats] == ["dense", "loopserve", "snapkv"]


def test_an_error_of_one_session_leaves_the_others(engine: Engine) -> None:
    chats = [engine.session() for _ in range(3)]
    texts = ["hello", "   ", "hello"]
    outcomes = engine.batch(zip(chats, texts, strict=True), max_new_tokens=4, return_errors=True)
    assert isinstance(outcomes[1], InputError) and chats[1].messages == []
    assert outcomes[0].text == outcomes[2].text == alone_short(engine)
    with pytest.raises(InputError, match="empty"):
        engine.batch(zip([engine.session() for _ in range(3)], texts, strict=True), max_new_tokens=4)
    with pytest.raises(InputError, match="appears twice"):
        engine.batch([(chats[0], "a"), (chats[0], "b")])


def alone_short(engine: Engine) -> str:
    with engine.session() as chat:
        return chat.send("hello", max_new_tokens=4).text


def test_asynchronous_turns_answer_as_synchronous_ones(engine: Engine) -> None:
    async def main() -> list[str]:
        chats = [engine.session() for _ in TEXTS]
        first = await asyncio.gather(
            *(chat.asend(text, max_new_tokens=8) for chat, text in zip(chats, TEXTS, strict=True))
        )
        pieces = [piece async for piece in chats[0].astream("and then?", max_new_tokens=8)]
        assert chats[0].last_reply is not None and "".join(pieces).strip() == chats[0].last_reply.text
        return [reply.text for reply in first] + [chats[0].last_reply.text]

    expected = [alone(engine, text)[0] for text in TEXTS] + [alone(engine, TEXTS[0], "and then?")[-1]]
    assert asyncio.run(main()) == expected
    assert asyncio.run(main()) == expected  # another event loop


def test_a_consumer_that_leaves_takes_its_turn_back(engine: Engine) -> None:
    async def main() -> None:
        chat, beside = engine.session(), engine.session()
        other = asyncio.create_task(beside.asend(TEXTS[1], max_new_tokens=8))
        stream = chat.astream(TEXTS[1], max_new_tokens=200, ignore_eos=True)
        await anext(stream)
        await stream.aclose()
        assert chat.messages == [] and not chat.open_session.busy
        task = asyncio.create_task(chat.asend(TEXTS[1], max_new_tokens=200, ignore_eos=True))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await other).text == alone(engine, TEXTS[1])[0]
        assert (await chat.asend("hello", max_new_tokens=4)).text == alone_short(engine)

    asyncio.run(main())


def test_errors_reach_the_awaiting_task(engine: Engine) -> None:
    async def main() -> None:
        chat = engine.session()
        with pytest.raises(InputError, match="empty"):
            await chat.asend(" ")
        chat.close()
        with pytest.raises(InputError, match="closed"):
            await chat.asend("hello")

    asyncio.run(main())


def test_a_closed_engine_is_not_kept_by_its_thread() -> None:
    def used() -> weakref.ref[Engine]:
        engine = Engine(*load("demo"), "dense")
        asyncio.run(engine.session().asend("hello", max_new_tokens=2))
        thread = engine.runner._thread
        if thread is not None:
            thread.join(timeout=60)
        return weakref.ref(engine)

    seen = used()
    gc.collect()
    assert seen() is None


def test_a_policy_fault_in_a_batch_is_that_sessions(engine: Engine) -> None:
    from loopserve import PolicyStack
    from loopserve.policies.decode.full import FullDecode
    from tests.core.test_scheduler import FailsAt

    failing = PolicyStack("fails", FailsAt(), FullDecode())
    chats = [engine.session(), engine.session(stack=failing)]
    words = next(text for n in range(1, 60) if len(chats[1].pending(text := "a " * n, {}).new_tokens) == 13)
    outcomes = engine.batch(zip(chats, ["hello", words], strict=True), max_new_tokens=4, return_errors=True)
    assert isinstance(outcomes[1], PolicyFault) and outcomes[0].text == alone_short(engine)
