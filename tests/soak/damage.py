"""R8: a damaged or foreign cache file is refused and removed, however it is damaged; the conversation is computed again."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from loopserve import load_stack
from loopserve.serve.kv_files import KVFiles, LoadedPairs, remove_orphans
from loopserve.serve.records import Path as TurnPath
from loopserve.serve.store import Store
from tests.serve.conftest import FACT, QUESTION, until
from tests.serve.test_chat_completions import ask, said
from tests.soak.cases import Cases, demo_engine, running

KINDS = (
    "flip",
    "flip",
    "flip",
    "cut",
    "grow",
    "swap",
    "zeros",
    "header",
    "gone",
    "folder",
    "link",
    "model",
    "stack",
    "manifest",
    "row",
)


def run(cases: int, seed: int = 0) -> Cases:
    found, draw = Cases(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder, "original")
        model = _converse(original)
        for number in range(cases):
            kind, place = KINDS[number % len(KINDS)], Path(folder, f"case-{number}")
            with found.case(f"{number} {kind}"):
                shutil.copytree(original, place)
                _check(place, kind, draw, model, opened_before=number // len(KINDS) % 2 == 1)
            shutil.rmtree(place, ignore_errors=True)
    return found


def _converse(directory: Path) -> str:
    """Write two conversations of three and one turns; return the fingerprint of the model."""
    with running(session_dir=directory) as server:
        messages = [FACT]
        for _ in range(3):
            messages += [said(ask(server, messages)), QUESTION]
        ask(server, [{"role": "user", "content": "the code of oslo is ember ."}])
        until(lambda: server.conversations.files.written == 4)
        return server.conversations.model


def _check(directory: Path, kind: str, draw: random.Random, model: str, *, opened_before: bool) -> None:
    engine = demo_engine()
    store = Store(directory)
    try:
        files, stack = KVFiles(store, model, engine.token_engine), engine.stack
        heads = [each for each in store.sessions() if each.head is not None]
        path = max(
            (store.path(each.tenant, each.head) or TurnPath() for each in heads), key=lambda each: len(each.turns)
        )
        whole = KVFiles(store, model, engine.token_engine).load(path, stack)
        assert whole is not None and whole.tokens >= len(path.tokens) - 1
        if opened_before:
            files.load(path, stack)
        if kind == "model":
            files = KVFiles(store, "another model", engine.token_engine)
        elif kind == "stack":
            stack = load_stack("snapkv")
        else:
            row = store.kv(draw.choice(path.ids))
            assert row is not None
            fields = ["fingerprint", "tokens", "checksums", "header", "end", "bytes"]
            fields += [] if opened_before else ["sha256"]  # compared once, the checksums every time
            if kind == "row":
                length = draw.randrange(len(json.dumps(row.manifest)))
                store._db.execute(
                    "UPDATE main.kv SET manifest = substr(manifest, 1, ?) WHERE turn=?", (length, row.turn)
                )
            _damage(
                directory / row.file, kind, draw, lambda: _change_manifest(store, row.turn, draw.choice(fields), draw)
            )
        _refused(files.load(path, stack), whole, everything=kind in ("model", "stack"))
        if kind not in ("model", "stack", "manifest", "row"):
            assert files.damaged >= 1
        _refused(files.load(path, stack), whole, everything=False)
        assert remove_orphans(store) == (kind == "row")  # without its row, a file is one of nobody
    finally:
        store.close()


def _refused(loaded: LoadedPairs | None, whole: LoadedPairs, *, everything: bool) -> None:
    """Nothing was loaded, or only files before the damaged one, whose pairs are exactly those that were written."""
    if loaded is None:
        return
    assert not everything and loaded.tokens < whole.tokens
    for one, other in zip(loaded.layers, whole.layers, strict=True):
        for part, of in zip(one, other, strict=True):
            assert torch.equal(part, of[:, : loaded.tokens])


def _damage(file: Path, kind: str, draw: random.Random, change_manifest: Callable[[], None]) -> None:
    data = bytearray(file.read_bytes())
    if kind in ("flip", "header"):
        end = len(data) if kind == "flip" else 8 + int.from_bytes(data[:8], "little")
        for _ in range(draw.choice((1, 1, 2))):
            data[draw.randrange(end)] ^= 1 << draw.randrange(8)
        if bytes(data) == file.read_bytes():  # the same bit twice
            data[-1] ^= 1
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    elif kind == "grow":
        data += os.urandom(draw.randrange(1, 100))
    elif kind == "zeros":
        start = draw.randrange(len(data) - 64)
        if not any(data[start : start + 64]):
            data[start] = 1
        else:
            data[start : start + 64] = bytes(64)
    elif kind == "swap":
        others = [each for each in file.parent.parent.glob("*/*.safetensors") if each.read_bytes() != bytes(data)]
        data = bytearray(draw.choice(others).read_bytes())
    elif kind == "manifest":
        change_manifest()
        return
    elif kind == "row":
        return
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "link":
        file.symlink_to(file.parent / "nowhere")
    elif kind != "gone":
        file.write_bytes(data)


def _change_manifest(store: Store, turn: str, field: str, draw: random.Random) -> None:
    """Change one field of the row of a file."""
    row = store.kv(turn)
    assert row is not None
    manifest = json.loads(json.dumps(row.manifest))
    size, sha = row.bytes, row.sha256
    if field == "checksums":
        manifest[field][draw.choice(sorted(manifest[field]))] += 1
    elif field == "end":
        manifest[field] += draw.choice((-1, 1))
    elif field == "sha256":
        sha = sha[::-1]
    elif field == "bytes":
        size += 1
    else:
        manifest[field] = manifest[field][::-1]
    store.put_kv(turn, row.file, size, sha, manifest)
