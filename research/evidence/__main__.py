"""``python -m research.evidence``: run what is not done yet, then write the page."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from loopserve.core.errors import LoopServeError
from research.evidence import page
from research.evidence.ledger import Ledger
from research.evidence.plan import FULL, QUICK, units_of
from research.evidence.units import Unit
from research.evidence.work import run_all


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    wanted = _parser().parse_args(arguments)
    here = Path("build/evidence") if wanted.quick else Path()
    results = wanted.results or (here / "rows" if wanted.quick else Path("benchmarks/results/evidence"))
    text = wanted.page or (here if wanted.quick else Path("docs")) / "evidence_bundled.md"
    try:
        failed = 0
        if not wanted.render:
            plan = [unit for unit in units_of(QUICK if wanted.quick else FULL) if _wanted(unit, wanted.only)]
            failed = _run(Ledger(results, plan, fresh=wanted.fresh), plan, wanted.workers)
        page.write(results, text, text.with_suffix(""))
    except LoopServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("broken off; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{text} written from {results}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m research.evidence", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, into build/evidence: shows that it runs, proves nothing"
    )
    parser.add_argument("--only", nargs="+", choices=page.EXPERIMENTS, help="these experiments only")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page from what is there")
    parser.add_argument("--fresh", action="store_true", help="do not go on with a run that was broken off")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument("--results", type=Path, help="folder of the rows")
    parser.add_argument("--page", type=Path, help="file of the page; its pictures go into a folder of the same name")
    return parser


def _wanted(unit: Unit, only: list[str] | None) -> bool:
    return only is None or unit.experiment in only


def _run(ledger: Ledger, plan: list[Unit], workers: int) -> int:
    """Run what is not done; how many units failed."""
    waiting, failed = ledger.waiting(plan), 0
    started = time.monotonic()
    for count, (unit, row) in enumerate(run_all(waiting, workers), 1):
        if isinstance(row, BaseException):
            failed += 1
            print(f"failed: {unit.name}: {row}", file=sys.stderr)
            continue
        ledger.add(row)
        gone = time.monotonic() - started
        left = gone / count * (len(waiting) - count)
        print(f"{count}/{len(waiting)}  {_clock(gone)} gone, about {_clock(left)} left  {unit.name}", file=sys.stderr)
    return failed


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
