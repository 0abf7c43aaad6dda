"""Run promises in their full forms, one after another, and append a row for each: ``python -m tests.soak [NAME...]``.

NAME: a promise (R3), or the beginning of its title. Without one, all are run. Each takes at most 30 minutes on two cores.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loopserve.bench.rows import append_rows, provenance
from tests.soak import (
    damage,
    disconnects,
    fairness,
    kills,
    leaks,
    ledger,
    overload,
    restarts,
    restore,
    streams,
    tenants,
)
from tests.soak.cases import Cases

OUTPUT = Path("benchmarks/results/soak.jsonl")


def _fuzz(cases: int, seed: int) -> Cases:
    from tests.soak import fuzz  # needs schemathesis, which no other promise does

    return fuzz.run(cases, seed)


FULL: dict[str, tuple[Callable[[int, int], Cases], int]] = {
    "R1 fuzz": (_fuzz, 10_000),
    "R3 disconnects": (disconnects.run, 200),
    "R4 overload": (partial(overload.run, apart=True), 600),
    "R5 ledger": (ledger.run, 330_000),
    "R6 tenants": (tenants.run, 4000),
    "R7 kills": (kills.run, 500),
    "R8 damaged files": (damage.run, 1000),
    "R9 restore": (restore.run, 38),
    "R12 restarts": (partial(restarts.run, crashes=5), 100),
    "R14 leaks": (leaks.run, 3000),
    "R15 fairness": (partial(fairness.run, apart=True), 5),
    "R15 fairness, 64 tokens a pass": (partial(fairness.run, apart=True, tokens=64), 5),
    "R17 streams": (streams.run, 500),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FULL)}")
    parser.add_argument("--cases", type=int, help="cases in place of the full number; nothing is written then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    chosen = [name for name in FULL if not given.names or any(_names(name, each) for each in given.names)]
    if not chosen:
        parser.error(f"no promise is called {', '.join(given.names)}")
    logging.disable(logging.CRITICAL)  # damage and faults are logged thousands of times
    status, conditions = 0, provenance()  # as the run begins: the checkout may be another one when it ends
    for name in chosen:
        run, cases = FULL[name]
        started = time.perf_counter()
        found = run(given.cases or cases, given.seed)
        row = {
            "op": "soak",
            "promise": name,
            **found.row,
            "seconds": round(time.perf_counter() - started, 1),
            "seed": given.seed,
        }
        print(f"{name}: {found.row}", flush=True)
        for failure in found.failures[:3]:
            print(failure, file=sys.stderr)
        status = status or bool(found.failures)
        if given.cases is None:
            append_rows(given.output, [row | conditions])
    return status


def _names(promise: str, given: str) -> bool:
    return promise.split()[0] == given or promise.partition(" ")[2].startswith(given) or promise == given


if __name__ == "__main__":
    sys.exit(main())
