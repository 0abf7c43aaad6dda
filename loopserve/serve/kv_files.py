"""Write the pairs of turns into checked files, and read them back. A file is a cache: anything off, and it is not used.

Each turn has a file with the pairs that it added; a conversation is restored from the files of its path. The first file of such a
chain begins at token 0. States of policies lie in the file of the turn that they belong to.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from loopserve.core.atomic_file import write_atomically
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.kv.buffers import PairBuffer
from loopserve.core.policy.state import PackedState
from loopserve.core.stack.stack import PolicyStack
from loopserve.serve.records import KVRow, Path, pack_tokens
from loopserve.serve.sealing import Sealer
from loopserve.serve.store import Store

_log = logging.getLogger("loopserve.serve")
LAYOUT = 2


@dataclass
class LoadedPairs:
    """Hold the pairs of the first ``tokens`` tokens of a path: per layer keys and values ``[Hkv, tokens, D]``."""

    tokens: int
    layers: list[tuple[Tensor, Tensor]] = field(repr=False)
    states: dict[str, PackedState] = field(repr=False)
    rotation: int = 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for pair in self.layers for part in pair)

    def restore(self, session: Session, device: torch.device) -> None:
        """Fill the empty cache of a session. States that cannot be read begin anew."""
        for layer, (keys, values) in zip(session.cache.own_layers, self.layers, strict=True):
            layer.append(keys.to(device), values.to(device))
        session.rotation = self.rotation
        for problem in session.restore_states(self.states, device).values():
            _log.warning("a policy begins anew after a restart: %s", problem)


class KVFiles:
    """Write and read the files below a session directory. Counts what it did; without a directory it does nothing."""

    def __init__(
        self,
        store: Store,
        model: str,
        engine: TokenEngine,
        most_bytes: int | None = None,
        most_bytes_per_tenant: int | None = None,
    ) -> None:
        """model: fingerprint of weights, tokenizer and template. most_bytes: of all files, and of those of a tenant; None = any."""
        self._most, self._most_per_tenant = most_bytes, most_bytes_per_tenant
        self._store, self._engine = store, engine
        self._model = f"{model} {engine.model.dtype} layout {LAYOUT}"
        self._known: set[str] = set()  # files whose sha256 was compared since the start
        self.written = self.restored = self.damaged = self.failed = self.evicted = 0

    def prepare(self, session: Session, path: Path, stack: PolicyStack) -> Callable[[], None]:
        """Return the work of writing the last turn of a path. Call this in the model's thread, the work in the store's.

        Later turns leave the pairs that the work refers to as they are, also if the session's cache is released.
        """
        stores = [layer.store for layer in session.cache.own_layers]
        tokens = session.cache.seen
        if self._store.directory is None or not all(
            isinstance(each, PairBuffer) and each.length == tokens for each in stores
        ):
            return lambda: None  # after an eviction, the conversation is computed from its tokens
        pairs = [(each.keys, each.values) for each in stores if each is not None]
        states, problems = session.pack_states()
        for problem in problems.values():
            _log.info("a state is not written: %s", problem)
        rotation = session.rotation
        return lambda: self._write(path, stack, LoadedPairs(tokens, pairs, states, rotation))

    def _write(self, path: Path, stack: PolicyStack, held: LoadedPairs) -> None:
        turn = path.turns[-1]
        chain = self._chain(Path(path.turns[:-1]), stack)
        start = chain[-1].manifest["end"] if chain else 0
        if chain and chain[-1].manifest["rotation"] != held.rotation:
            start = 0
        tensors = {}
        for number, (keys, values) in enumerate(held.layers):
            tensors[f"keys.{number}"] = keys[:, start : held.tokens].contiguous().cpu()
            tensors[f"values.{number}"] = values[:, start : held.tokens].contiguous().cpu()
        trees = {}
        for slot, (tree, parts) in held.states.items():
            trees[slot] = [tree, len(parts)]
            tensors |= {f"state.{slot}.{number}": part.contiguous().cpu() for number, part in enumerate(parts)}
        data = save(tensors, {"format": "pt", "loopserve": f"kv layout {LAYOUT}"})
        folder = f"{turn.tenant}/{turn.session}"
        sealed = self._store.sealer.seal(data, f"{folder} {turn.id} pairs")
        sha = hashlib.sha256(sealed).hexdigest()
        manifest = {
            "start": start,
            "end": held.tokens,
            "rotation": held.rotation,
            "fingerprint": self._fingerprint(stack),
            "tokens": _tokens_digest(path, held.tokens),
            "header": _header(data),
            "checksums": {name: _checksum(each) for name, each in tensors.items()},
            "states": trees,
        }
        file = f"{folder}/gen-{len(path.turns)}-{sha[:16]}.safetensors"
        try:
            target = self._place(file)
            for each in (
                target.parent.parent,
                target.parent,
            ):  # not parents=True, which makes the first for everybody to read
                each.mkdir(exist_ok=True, mode=0o700)
            write_atomically(target, sealed, mode=0o600)
            self._store.put_kv(turn.id, file, len(sealed), sha, manifest)
        except Exception as error:  # a full disk, for example: the conversation itself is committed already
            self.failed += 1
            _log.warning("the cache of a turn was not written (%s): it will be computed again after a restart", error)
            return
        self._known.add(file)
        if self._most is not None or self._most_per_tenant is not None:
            self._keep_within_limits()
        self.written += 1

    def _keep_within_limits(self) -> None:
        """Remove the files of whole sessions, least recently written first, until tenants and directory are within their limits."""
        held: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for turn, file, size in self._store.kv_sizes():
            tenant, session, _ = file.split("/")
            held[tenant, session] = [*held.pop((tenant, session), []), (turn, size)]
        tenants: Counter[str] = Counter()
        for (tenant, _), turns in held.items():
            tenants[tenant] += sum(size for _, size in turns)
        for (tenant, _), turns in held.items():
            too_much = self._most is not None and tenants.total() > self._most
            if too_much or (self._most_per_tenant is not None and tenants[tenant] > self._most_per_tenant):
                self.remove([turn for turn, _ in turns])
                tenants[tenant] -= sum(size for _, size in turns)
                self.evicted += len(turns)

    def load(self, path: Path, stack: PolicyStack, more_than: int = 0) -> LoadedPairs | None:
        """Return what the files hold of a path; None if that is no more than ``more_than`` tokens. Damaged files are removed."""
        if self._store.directory is None:
            return None
        while True:
            chain = self._chain(path, stack)
            if not chain or chain[-1].manifest["end"] <= more_than:
                return None
            parts = []
            for row in chain:
                tensors = self._read(row)
                if tensors is None:
                    break
                parts.append(tensors)
            else:
                self.restored += 1
                return _joined(chain, parts)

    def remove(self, turns: list[str]) -> None:
        """Remove the files of turns."""
        remove_files(self._store, turns)

    def _chain(self, path: Path, stack: PolicyStack) -> list[KVRow]:
        """Return the rows that hold the longest beginning of a path, in order."""
        for count in range(len(path.turns), 0, -1):
            chain: list[KVRow] = []
            wanted: int | None = None
            for number in range(count, 0, -1):
                row = self._store.kv(path.turns[number - 1].id)
                if row is None or not self._fits(row, Path(path.turns[:number]), stack, wanted, chain):
                    break
                chain.insert(0, row)
                wanted = row.manifest["start"]
                if wanted == 0:
                    return chain
        return []

    def _fits(self, row: KVRow, path: Path, stack: PolicyStack, end: int | None, later: list[KVRow]) -> bool:
        held = row.manifest
        return bool(
            held["fingerprint"] == self._fingerprint(stack)
            and (end is None or held["end"] == end)
            and (not later or held["rotation"] == later[0].manifest["rotation"])
            and held["end"] <= len(path.tokens)
            and held["tokens"] == _tokens_digest(path, held["end"])
        )

    def _read(self, row: KVRow) -> dict[str, Tensor] | None:
        try:
            tensors = checked(self._place(row.file), row, whole=row.file not in self._known, sealer=self._store.sealer)
        except (OSError, ValueError, SafetensorError) as error:
            _log.error("%s is damaged: it is removed and computed again (%s)", row.file, error)
            self.damaged += 1
            self._remove(row)
            return None
        self._known.add(row.file)
        return tensors

    def _remove(self, row: KVRow) -> None:
        self._store.drop_kv([row.turn])
        place = self._place(row.file)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)  # else no file of this name could be written again
            return
        with suppress(OSError):
            place.unlink()

    def _place(self, file: str) -> FilePath:
        assert self._store.directory is not None
        return self._store.directory / file

    def _fingerprint(self, stack: PolicyStack) -> str:
        owners = sorted(set(map(str, stack.owners.values())))
        return hashlib.sha256(f"{self._model} {stack.digest} {owners}".encode()).hexdigest()


def _joined(chain: list[KVRow], parts: list[dict[str, Tensor]]) -> LoadedPairs:
    count = len([name for name in parts[-1] if name.startswith("keys.")])
    layers = [
        tuple(torch.cat([part[f"{kind}.{number}"] for part in parts], dim=1) for kind in ("keys", "values"))
        for number in range(count)
    ]
    last: dict[str, Any] = chain[-1].manifest
    states = {
        slot: (tree, [parts[-1][f"state.{slot}.{number}"] for number in range(size)])
        for slot, (tree, size) in last["states"].items()
    }
    return LoadedPairs(last["end"], [(keys, values) for keys, values in layers], states, last["rotation"])


def _tokens_digest(path: Path, count: int) -> str:
    return hashlib.sha256(pack_tokens(path.tokens[:count])).hexdigest()


def _checksum(tensor: Tensor) -> int:
    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _header(data: bytes) -> str:
    """Return a checksum of what says how the bytes of the tensors are read: their names, types, shapes and places."""
    return hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()


def checked(place: FilePath, row: KVRow, whole: bool = True, sealer: Sealer | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises OSError, ValueError or SafetensorError if anything differs from its row.

    whole: compare the sha256 of the file too, and not only size, header and checksums of the tensors.
    """
    data = place.read_bytes()
    if len(data) != row.bytes:
        raise ValueError(f"it has {len(data)} bytes instead of {row.bytes}")
    if whole and hashlib.sha256(data).hexdigest() != row.sha256:
        raise ValueError("its sha256 is another one")
    if sealer is not None:
        data = sealer.open(data, f"{row.file.rpartition('/')[0]} {row.turn} pairs")
    if _header(data) != row.manifest["header"]:
        raise ValueError("its header is another one")
    tensors = load(data)
    sums = row.manifest["checksums"]
    if tensors.keys() != sums.keys() or any(_checksum(each) != sums[name] for name, each in tensors.items()):
        raise ValueError("a checksum of its tensors is another one")
    return tensors


def damaged_files(store: Store) -> list[tuple[str, str]]:
    """Compare every file with its row; return the names of those that are damaged, or whose row is, with the reason."""
    if store.directory is None:
        return []
    found = [(file, f"its row in the database: {reason}") for _, file, reason in store.damaged_kv()]
    for row in store.every_kv():
        try:
            checked(store.directory / row.file, row, sealer=store.sealer)
        except (OSError, ValueError, SafetensorError) as error:
            found.append((row.file, str(error)))
    return found


def remove_files(store: Store, turns: list[str]) -> None:
    """Remove the files of turns and their rows."""
    for turn in turns:
        row = store.kv(turn)
        if row is not None and store.directory is not None:
            with suppress(OSError):
                (store.directory / row.file).unlink()
    store.drop_kv(turns)


def remove_orphans(store: Store) -> int:
    """Remove damaged rows, and files that no row names: a writer was killed between the file and its row. Return how many files."""
    if store.directory is None:
        return 0
    for turn, file, reason in (damaged := store.damaged_kv()):
        _log.error("the manifest of turn %s (%s) cannot be read and is dropped: %s", turn, file, reason)
    store.drop_kv([turn for turn, _, _ in damaged])
    known = {row.file for row in store.every_kv()}
    orphans = [
        each
        for each in store.directory.glob("*/*/*")
        if each.is_file() and str(each.relative_to(store.directory)) not in known
    ]
    for each in orphans:
        with suppress(OSError):
            each.unlink()
    return len(orphans)
