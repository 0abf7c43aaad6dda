"""Serve measurements of one peer: a JSON request per line on stdin, a JSON reply per line on stdout. Needs the standard library alone.

After loading, a worker writes ``{"versions": {...}}``, or an error as below. Requests:

- ``{"fresh": true}``: forget all conversations, cached prefixes included. Reply: ``{}``.
- ``{"conversations": [[token ids], ...], "outputs": n}``: answer each conversation, given from its beginning, with ``n`` tokens,
  greedily and without a stop token. What earlier requests computed of them may be used again. Reply: ``tokens`` (answers),
  ``ttft_s`` (until the last conversation has its first token), ``token_s`` (from there on, per token over all conversations), both
  also as ``_cpu_s`` (processor time of all threads), ``peak_mib`` (largest resident memory since the last ``fresh``).

A request that fails is answered ``{"error": text}``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

Conversations = Sequence[Sequence[int]]


class Peer(Protocol):
    """Answer conversations with an engine."""

    packages: Sequence[str]
    """Distributions whose versions are reported."""

    def fresh(self) -> None:
        """Forget all conversations."""

    def answer(self, conversations: Conversations, outputs: int) -> Iterator[tuple[int, int]]:
        """Yield (conversation, token) as tokens are made."""


def options(description: str | None) -> argparse.Namespace:
    """Return the command line of a worker."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="transformers directory, float32 weights")
    parser.add_argument("--gguf", type=Path, help="the GGUF file that the directory was made of")
    parser.add_argument("--cache", type=Path, required=True, help="folder for converted models")
    parser.add_argument("--variant", default="", help="what the driver's table of peers names")
    parser.add_argument(
        "--longest", type=int, required=True, help="tokens of the longest conversation, answers included"
    )
    parser.add_argument("--conversations", type=int, default=1, help="most conversations at once")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def common(held: Sequence[int], wanted: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    return next(
        (at for at, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), min(len(held), len(wanted))
    )


def serve(make: Callable[[], Peer]) -> None:
    """Load a peer and answer requests until stdin ends. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        peer = make()
    except Exception as error:  # a peer may raise anything; the driver records it
        _say(replies, _failure(error))
        raise
    _say(replies, {"versions": {name: version(name) for name in peer.packages}})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.get("fresh"):
                peer.fresh()
                reset_peak()
                reply: dict[str, Any] = {}
            else:
                reply = measure(peer, request["conversations"], request["outputs"])
        except Exception as error:  # a peer may raise anything; the driver records it
            reply = _failure(error)
        _say(replies, reply)


def measure(peer: Peer, conversations: Conversations, outputs: int) -> dict[str, Any]:
    """Return answers and times of one request."""
    tokens: list[list[int]] = [[] for _ in conversations]
    times: list[tuple[float, float]] = []
    begun = 0  # tokens made when every conversation had its first
    start = time.perf_counter(), time.process_time()
    for number, token in peer.answer(conversations, outputs):
        times.append((time.perf_counter(), time.process_time()))
        tokens[number].append(token)
        if not begun and all(tokens):
            begun = len(times)
    if any(len(each) != outputs for each in tokens):
        raise RuntimeError(f"answers have {[len(each) for each in tokens]} tokens, {outputs} were asked for")
    found: dict[str, Any] = {"tokens": tokens, "peak_mib": peak_mib()}
    for place, name in enumerate(("", "cpu_")):
        found[f"ttft_{name}s"] = times[begun - 1][place] - start[place]
        if rest := len(times) - begun:
            found[f"token_{name}s"] = (times[-1][place] - times[begun - 1][place]) / rest
    if nearest := getattr(peer, "nearest", None):
        found["nearest"] = nearest
    return found


def reset_peak() -> None:
    """Let ``peak_mib`` begin anew, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_mib() -> float:
    """Return the largest resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"[:500]}


def _say(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
