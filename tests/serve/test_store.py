"""Trees of turns: whatever sessions are forked, moved back and removed, what others are at stays, and nothing is left at the end."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from loopserve.serve.records import Path, StoredSession, new_id
from loopserve.serve.store import Store
from tests.soak.kills import turn_of

TENANT = "anonymous"


def grown(store: Store, draw: random.Random, count: int) -> list[StoredSession]:
    """Commit a random tree of turns, with sessions at some of them."""
    sessions: list[StoredSession] = []
    paths: list[Path] = [Path()]
    for number in range(count):
        before = draw.choice(paths)
        path, session = turn_of(number, before)
        at = draw.choice(sessions) if sessions and draw.random() < 0.5 else replace(session, id=new_id())
        path = Path((*before.turns, replace(path.turns[-1], session=at.id)))
        at = replace(at, head=path.ids[-1])
        store.commit(path, at)
        sessions = [each for each in sessions if each.id != at.id] + [at]
        paths.append(path)
        if draw.random() < 0.3:
            moved = draw.choice(sessions)
            there = store.path(TENANT, moved.head) if moved.head is not None else None
            moved_back = replace(moved, head=there.turns[-1].parent if there is not None else None)
            store.put_session(moved_back)
            sessions = [each for each in sessions if each.id != moved.id] + [moved_back]
    return sessions


@pytest.mark.parametrize("seed", range(30))
def test_removed_sessions_take_only_their_own_along(seed: int) -> None:
    store, draw = Store(None), random.Random(seed)
    sessions = grown(store, draw, 25)
    draw.shuffle(sessions)
    for number, session in enumerate(sessions):
        store.remove_session(TENANT, session.id)
        left = sessions[number + 1 :]
        assert {each.id for each in store.sessions()} == {each.id for each in left}
        for each in left:
            assert each.head is None or store.path(TENANT, each.head) is not None
        turns = [row[0] for row in store._db.execute("SELECT id FROM every_turns")]
        assert all(store.path(TENANT, each) is not None for each in turns)
    assert store._db.execute("SELECT count(*) FROM every_turns").fetchone() == (0,)
    store.close()


@pytest.mark.parametrize("seed", range(20))
def test_turns_that_come_before_themselves_go_with_the_last_session_that_is_at_them(seed: int) -> None:
    store, draw = Store(None), random.Random(seed)
    sessions = grown(store, draw, 25)
    turns = [row[0] for row in store._db.execute("SELECT id FROM every_turns ORDER BY id")]
    root, *_, last = max((store.path(TENANT, each) or Path() for each in turns), key=lambda path: len(path.ids)).ids
    for db in ("main", "spare"):
        store._db.execute(f"UPDATE {db}.turns SET parent = ? WHERE id = ?", (last, root))
    draw.shuffle(sessions)
    for number, session in enumerate(sessions):
        store.remove_session(TENANT, session.id)
        assert {each.id for each in store.sessions()} == {each.id for each in sessions[number + 1 :]}
    assert store._db.execute("SELECT count(*) FROM every_turns").fetchone() == (0,)
    store.close()


def test_a_fork_takes_along_the_turns_of_a_session_that_was_removed_before() -> None:
    store = Store(None)
    path, session = turn_of(0, Path())
    session = replace(session, id=new_id())
    path = Path((replace(path.turns[-1], session=session.id),))
    store.commit(path, replace(session, head=path.ids[-1]))
    store.put_object(TENANT, path.ids[-1], {"kept": "beside the turn"})
    fork = replace(session, id=new_id(), head=path.ids[-1])
    store.put_session(fork)
    assert store.remove_session(TENANT, session.id) == []
    assert store.path(TENANT, path.ids[-1]) == path and store.object(TENANT, path.ids[-1]) is not None
    assert store.remove_session(TENANT, fork.id) == path.ids
    assert store.turn(TENANT, path.ids[-1]) is None and store.object(TENANT, path.ids[-1]) is None
    assert store.remove_session(TENANT, fork.id) == []  # it is gone already
    store.close()
