"""R7: a writer is killed at random points; nothing that it reported is lost, nothing else is left.

Runs as a process of its own, which forks a writer for each kill: ``python -m tests.soak.kills CASES SEED``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from loopserve import load_stack
from loopserve.serve.directory import SharedDirectory
from loopserve.serve.kv_files import KVFiles, LoadedPairs, damaged_files, remove_orphans
from loopserve.serve.matching import ROOT, extend
from loopserve.serve.records import Path as TurnPath
from loopserve.serve.records import StoredSession, StoredTurn
from loopserve.serve.store import Store
from tests.soak.cases import Cases

TENANT, PER_TURN = "anonymous", 40


def run(cases: int, seed: int = 0) -> Cases:
    command = [sys.executable, "-W", "ignore", "-m", "tests.soak.kills", str(cases), str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Cases(**json.loads(done.stdout))


def turn_of(number: int, before: TurnPath | None) -> tuple[TurnPath, StoredSession]:
    """Return a path with one turn more, and its session. All that it holds follows from the number."""
    before, name = before or TurnPath(), f"{number // 100:032x}"
    messages = ({"role": "user", "content": f"question {number} " + "x" * (number % 7 * 100)},)
    answer = {"role": "assistant", "content": f"answer {number}"}
    turn = StoredTurn(
        id=f"{number:032x}",
        session=name,
        parent=before.head.id if before.head else None,
        tenant=TENANT,
        model="model",
        stack="stack",
        digest=extend(before.head.digest if before.head else ROOT, [*messages, answer]),
        messages=messages,
        answer=answer,
        prompt_tokens=tuple(range(number, number + PER_TURN // 2)),
        output_tokens=tuple(range(PER_TURN // 2)),
        created=float(number),
        finish_reason="stop",
        figures={},
    )
    return TurnPath((*before.turns, turn)), StoredSession(name, TENANT, None, turn.id, 0.0, float(number))


def _write(directory: Path, reported: int) -> None:
    """Commit turns and write their caches until killed; report each that is committed."""
    store, held = Store(directory), SharedDirectory(directory)
    if held.alone:
        remove_orphans(store)
        held.share()
    files, stack = _files(store), load_stack("dense")
    number, path = len(store.sessions()) * 100, None
    while True:
        path, session = turn_of(number, path)
        store.commit(path, session)
        os.write(reported, f"{number}\n".encode())
        tokens = len(path.tokens)
        pairs = [(torch.full((2, tokens, 8), float(number)), torch.ones(2, tokens, 8)) for _ in range(2)]
        files._write(path, stack, LoadedPairs(tokens, pairs, {}))
        number += 1


def _files(store: Store) -> KVFiles:
    engine: Any = SimpleNamespace(model=SimpleNamespace(dtype=torch.float32))
    return KVFiles(store, "model", engine)


def _kill_once(directory: Path, draw: random.Random) -> None:
    begun = len(list(_sessions(directory)))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _write(directory, writing)
        finally:
            os._exit(9)
    os.close(writing)
    time.sleep(draw.random() * 0.12)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    with os.fdopen(reading) as lines:
        reported = [int(line) for line in lines if line.endswith("\n")]
    _look_at(directory, reported, begun)


def _sessions(directory: Path) -> list[StoredSession]:
    store = Store(directory)
    found = store.sessions()
    store.close()
    return found


def _look_at(directory: Path, reported: list[int], begun: int) -> None:
    store, held = Store(directory), SharedDirectory(directory)
    assert held.alone, "the killed writer still holds the directory"
    remove_orphans(store)
    held.close()
    try:
        if reported:
            whole, _ = turn_of(begun * 100, None)
            for number in range(begun * 100 + 1, reported[-1] + 1):
                whole, _ = turn_of(number, whole)
            assert store.path(TENANT, f"{reported[-1]:032x}") == whole
        for session in store.sessions():
            assert session.head is not None and store.path(TENANT, session.head) is not None
        assert not damaged_files(store)
        left = {str(each.relative_to(directory)) for each in directory.glob("*/*/*") if each.is_file()}
        assert left == {row.file for row in store.every_kv()}
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for row in store.every_kv()[-3:]:
            path = store.path(TENANT, row.turn)
            assert path is not None
            loaded = _files(store).load(path, load_stack("dense"))
            assert loaded is not None and loaded.tokens == len(path.tokens)
    finally:
        store.close()


def main(cases: int, seed: int) -> None:
    found, draw = Cases(), random.Random(seed)
    for number in range(cases):
        if number % 20 == 0:  # a new directory, so that looking at it does not take ever longer
            folder = tempfile.TemporaryDirectory()
        with found.case(f"kill {number}"):
            _kill_once(Path(folder.name), draw)
    print(json.dumps({"failures": found.failures, "count": found.count, "figures": found.figures}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
