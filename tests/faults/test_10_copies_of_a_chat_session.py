"""A chat session can be copied, and pickled where its engine is; elsewhere it says what to use."""

from __future__ import annotations

import copy
import pickle

import pytest

from loopserve import ChatSession, Engine
from loopserve.core.errors import InputError


@pytest.fixture(scope="module")
def chat() -> ChatSession:
    session = Engine.from_pretrained("demo", "snapkv").session()
    session.send("hello there", max_new_tokens=4)
    return session


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda chat: pickle.loads(pickle.dumps(chat))])
def test_a_copy_goes_on_as_a_fork(chat: ChatSession, copied: object) -> None:
    other, reference = copied(chat), chat.fork()  # type: ignore[operator]
    assert other.engine is chat.engine
    said = [each.send("and now?", max_new_tokens=4).token_ids for each in (other, reference)]
    assert said[0] == said[1] and len(chat.messages) == 2
    assert other.undo()["content"] == "and now?" and other.messages == chat.messages
    inside = copy.deepcopy({"chats": [chat, chat]})["chats"]
    assert inside[0] is inside[1] and inside[0].messages == chat.messages


def test_a_pickle_of_a_session_whose_engine_is_gone_names_save_and_load(chat: ChatSession) -> None:
    function, (_, *rest) = chat.__reduce__()
    with pytest.raises(InputError, match=r"session\.save\(path\).*engine\.load_session\(path\)"):
        function("another process's engine", *rest)


def test_a_session_that_writes_an_answer_is_not_copied(chat: ChatSession) -> None:
    stream = chat.stream("hello there", max_new_tokens=4)
    next(stream)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="still being written"):
            attempt(chat)
    stream.close()  # type: ignore[attr-defined]
