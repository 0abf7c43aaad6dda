"""Measure peers in interleaved rounds, each in a process of its own, and hold every answer against dense attention's."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.peers.prompts import Case, folders, messages
from loopserve.bench.peers import TIE
from loopserve.bench.rows import Row, append_rows, commit, provenance, read_rows

HERE = Path(__file__).parent
REFERENCE = "reference"
LOAD_S, REQUEST_S = 1800.0, 1200.0
WARM_UP = {"conversations": [[*range(100, 356)]], "outputs": 4}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """Describe a row of the table. environment: ``own`` is this interpreter's, others are built by ``make``."""

    environment: str
    script: str
    variant: str


class WorkerError(Exception):
    """Say why a worker gave no figures."""


class Worker:
    """Hold the process of a peer."""

    def __init__(self, command: Sequence[str | Path], threads: int, log: Path) -> None:
        """Start a worker and wait until it has loaded. log: takes what it prints. Raises WorkerError if it cannot load."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment |= {
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(HERE.parents[1]),
        }  # only loopserve's own imports it
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [str(each) for each in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        try:
            self.versions: dict[str, str] = self._reply(LOAD_S)["versions"]
        except WorkerError:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any], seconds: float = REQUEST_S) -> dict[str, Any]:
        """Return the reply to a request. Raises WorkerError if there is none; the process is ended then."""
        try:
            _pipe(self._process.stdin).write(json.dumps(request).encode() + b"\n")
            _pipe(self._process.stdin).flush()
        except OSError as error:
            raise WorkerError(f"the process has ended ({self._process.poll()})") from error
        return self._reply(seconds)

    def _reply(self, seconds: float) -> dict[str, Any]:
        output = _pipe(self._process.stdout)
        if not select.select([output], [], [], seconds)[0]:
            self.close()
            raise WorkerError(f"no reply within {seconds:.0f} s")
        line = output.readline()
        if not line:
            raise WorkerError(f"the process has ended ({self._process.wait()})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with suppress(OSError):  # it may hold a request that nobody reads any more
            _pipe(self._process.stdin).close()
        _pipe(self._process.stdout).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


@dataclass(frozen=True)
class Plan:
    """Say what is measured. environments: folder of the peers' environments; what they convert is kept below it."""

    peers: Mapping[str, Peer]
    reference: Peer
    cases: Sequence[Case]
    threads: Sequence[int]
    rounds: int
    environments: Path
    output: Path
    new: int = 256
    outputs: int = 24

    @property
    def cache(self) -> Path:
        return self.environments / "models"

    def worker(self, peer: Peer, model: str, threads: int) -> Worker:
        """Start a worker for all cases of a model."""
        cases = [each for each in self.cases if each.model == model]
        folder, gguf = folders(model, self.cache)
        log = self.environments / "logs" / f"{Path(peer.script).stem}-{peer.variant}.log"
        return Worker(
            [
                *(interpreter(peer, self.environments), HERE / peer.script, "--model", folder, "--cache", self.cache),
                *(("--gguf", gguf) if gguf else ()),
                *("--variant", peer.variant, "--threads", str(threads)),
                *("--longest", str(max(each.prompt for each in cases) + self.new + 2 * self.outputs)),
                *("--conversations", str(max(each.conversations for each in cases))),
            ],
            threads,
            log,
        )


def interpreter(peer: Peer, environments: Path) -> Path | str:
    """Return what runs a peer's script. Build its environment by ``make`` if it is not there."""
    if peer.environment == "own":
        return sys.executable
    folder = environments.absolute() / peer.environment
    if not (folder / "ready").exists():
        command = ["make", f"PEERS={environments.absolute()}", folder / "ready"]
        subprocess.run(command, cwd=HERE.parents[1], check=True, stdout=sys.stderr)
    return "node" if peer.script.endswith(".mjs") else folder / "bin" / "python"


def run(plan: Plan, say: Say) -> None:
    """Append a row for every peer, case, round and number of threads. Those that the output holds, of this commit, are left out."""
    known = read_rows(plan.output) if plan.output.exists() else []
    done = {identity(row) for row in known if row["op"] == "peer" and row["commit"] == commit()}
    answers = {row["digest"]: row for row in known if row["op"] == "peers_reference"}
    models = list(dict.fromkeys(each.model for each in plan.cases))
    for model in models:
        asked = [
            (each, messages(each, plan.new, folders(model, plan.cache)[0]))
            for each in plan.cases
            if each.model == model
        ]
        for case, texts in asked:
            if _digest(case, texts, plan.outputs) not in answers:
                row = _reference(plan, case, texts, say)
                append_rows(plan.output, [row])
                answers[row["digest"]] = row
        for threads in plan.threads:
            workers: dict[str, Worker] = {}
            try:
                for number in range(1, plan.rounds + 1):
                    for case, texts in asked:
                        for name in rotated(list(plan.peers), number - 1):
                            conditions = {**_conditions(plan, case, threads), "peer": name, "round": number}
                            if identity(conditions) in done:
                                continue
                            say(f"{threads} thread(s), round {number} of {plan.rounds}, {case.name}: {name}")
                            dense = answers[_digest(case, texts, plan.outputs)]
                            row = conditions | _measure(plan, name, workers, case, threads, texts, dense)
                            append_rows(plan.output, [row])
            finally:
                for each in workers.values():
                    each.close()


def rotated(names: list[str], by: int) -> list[str]:
    """Return the names, beginning with another one each round."""
    return names[by % len(names) :] + names[: by % len(names)]


def identity(row: Mapping[str, Any]) -> str:
    """Return what tells a measurement from others of the same commit."""
    fields = ("peer", "model", "prompt", "conversations", "new", "outputs", "threads", "round")
    return json.dumps([row[each] for each in fields])


def _conditions(plan: Plan, case: Case, threads: int) -> Row:
    return {
        "op": "peer",
        "model": case.model,
        "prompt": case.prompt,
        "conversations": case.conversations,
        "new": plan.new,
        "outputs": plan.outputs,
        **provenance(),
        "threads": threads,
    }


def _measure(
    plan: Plan,
    name: str,
    workers: dict[str, Worker],
    case: Case,
    threads: int,
    texts: list[list[list[int]]],
    dense: Row,
) -> Row:
    """Return the figures of one conversation of two turns, or the error that a peer ended with, in one of them or in both."""
    replies: list[dict[str, Any]] = []
    found: Row = {}
    try:
        if name not in workers:
            workers[name] = plan.worker(plan.peers[name], case.model, threads)
            workers[name].ask(WARM_UP)
        found["versions"] = workers[name].versions
        for reply in converse(workers[name], texts, plan.outputs, dense["tokens"][0]):
            replies.append(reply)
    except WorkerError as error:
        if name in workers:
            workers.pop(name).close()
        failure = {"error": without_paths(str(error))}
        found |= {"later": failure} if replies else failure
    for turn, reply in enumerate(replies):
        times = {key: round(value, 5) for key, value in reply.items() if key.endswith("_s")}
        found["later" if turn else "first"] = times | compared(
            reply["tokens"], dense["tokens"][turn], dense["nearest"][turn]
        )
        found["peak_mib"] = round(reply["peak_mib"], 1)
    return found


def converse(
    worker: Worker, texts: list[list[list[int]]], outputs: int, answers: list[list[int]] | None
) -> Iterator[dict[str, Any]]:
    """Yield the replies to both turns. answers: what the second turn's history holds for the first; None: the peer's own."""
    worker.ask({"fresh": True})
    first = worker.ask({"conversations": [each[0] for each in texts], "outputs": outputs})
    yield first
    answers = answers or first["tokens"]
    histories = [[*each[0], *answer, *each[1]] for each, answer in zip(texts, answers, strict=True)]
    yield worker.ask({"conversations": histories, "outputs": outputs})


def compared(
    tokens: Sequence[Sequence[int]], dense: Sequence[Sequence[int]], nearest: Sequence[Sequence[Mapping[str, float]]]
) -> Row:
    """Return how the answers of a turn, ``[conversation][token]``, compare with dense's.

    ``same_tokens``: equal tokens before the first difference, the fewest of all answers. ``gap``: by how much, in natural log
    probability, dense prefers its own token at a first difference, the largest of all; None where the other token is not
    among its 20 likeliest. ``agrees``: no difference, or only such as rounding makes (gap at most ``TIE``).
    """
    fewest, gaps = len(dense[0]), list[float | None]()
    for given, expected, near in zip(tokens, dense, nearest, strict=True):
        at = next((at for at, (a, b) in enumerate(zip(given, expected, strict=True)) if a != b), None)
        if at is not None:
            fewest = min(fewest, at)
            gaps.append(near[at].get(str(given[at])))
    known = [each for each in gaps if each is not None]
    gap = None if len(known) < len(gaps) else max(known, default=0.0)
    return {"same_tokens": fewest, "gap": gap, "agrees": gap is not None and gap <= TIE}


def _reference(plan: Plan, case: Case, texts: list[list[list[int]]], say: Say) -> Row:
    say(f"{case.name}: what dense attention answers in float32")
    worker = plan.worker(plan.reference, case.model, max(plan.threads))
    try:
        replies = list(converse(worker, texts, plan.outputs, None))
    finally:
        worker.close()
    return {
        **_conditions(plan, case, max(plan.threads)),
        "op": "peers_reference",
        "versions": worker.versions,
        "digest": _digest(case, texts, plan.outputs),
        "tokens": [each["tokens"] for each in replies],
        "nearest": [each["nearest"] for each in replies],
    }


def _digest(case: Case, texts: Sequence[Any], outputs: int) -> str:
    """Return what tells an answer of dense attention from others."""
    return hashlib.sha256(json.dumps([case.model, texts, outputs]).encode()).hexdigest()[:16]


def without_paths(text: str) -> str:
    """Return a text for a row: paths of this machine are left out."""
    return re.sub(r"(?:/[\w.+@-]+){2,}", "...", text)
