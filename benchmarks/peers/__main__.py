"""Measure loopserve beside other engines on one machine: ``make bench-peers``, ``docs/benchmark.md``.

Rows are appended to a JSONL file; a run that was broken off goes on where it was, as long as the commit is the same.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.peers.driver import Peer, Plan, run
from benchmarks.peers.prompts import Case

PEERS = {
    "loopserve dense": Peer("own", "peer_loopserve.py", "dense"),
    "loopserve": Peer("own", "peer_loopserve.py", "loopserve"),
    "loopserve-paper": Peer("own", "peer_loopserve.py", "loopserve-paper"),
    "loopserve dense, int8": Peer("own", "peer_loopserve.py", "dense@int8"),
    "loopserve, int8": Peer("own", "peer_loopserve.py", "loopserve@int8"),
    "loopserve-paper, int8": Peer("own", "peer_loopserve.py", "loopserve-paper@int8"),
    "OpenVINO int8": Peer("openvino", "peer_openvino.py", "dense"),
    "OpenVINO int8, XATTENTION": Peer("openvino", "peer_openvino.py", "xattention"),
    "OpenVINO int8, TRISHAPE": Peer("openvino", "peer_openvino.py", "trishape"),
    "OpenVINO int8, eviction": Peer("openvino", "peer_openvino.py", "eviction"),
    "transformers": Peer("transformers", "peer_transformers.py", "bfloat16-dynamic"),
    "transformers, static cache": Peer("transformers", "peer_transformers.py", "bfloat16-static"),
    "transformers float32": Peer("transformers", "peer_transformers.py", "float32-dynamic"),
    "vLLM": Peer("vllm", "peer_vllm.py", ""),
    "llama.cpp Q4_1": Peer("llama-cpp", "peer_llama_cpp.mjs", ""),
}
DENSE = Peer("transformers", "peer_transformers.py", "reference")
CASES = (
    "smollm2:2048",
    "smollm2:4096",
    "smollm2:7680",
    "smollm2:2048x4",
    "smollm2:2048x8",
    "random:16384",
    "random:32768",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument(
        "--cases", nargs="+", type=Case.read, default=[*map(Case.read, CASES)], metavar="MODEL:TOKENS[xN]"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of 2,048 tokens with one thread")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers.jsonl"))
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path(os.environ.get("PEERS", ".venv-peers")),
        help="folder of the peers' environments, logs and converted models",
    )
    given = parser.parse_args()
    if given.quick:
        given.cases, given.threads, given.rounds = [Case.read("smollm2:2048")], [1], 1
    plan = Plan(
        peers={name: PEERS[name] for name in given.peers},
        reference=DENSE,
        cases=given.cases,
        threads=given.threads,
        rounds=given.rounds,
        environments=given.environments,
        output=given.output,
    )
    run(plan, lambda text: print(text, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
