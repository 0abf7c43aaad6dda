"""``python -m research.evidence``: run what is not done yet, then write the page."""

from __future__ import annotations

import argparse
import sys
import time

from research.evidence import page
from research.evidence.command import parser_of, places, show_progress, status_of
from research.evidence.ledger import Ledger
from research.evidence.plan import FULL, QUICK, units_of
from research.evidence.units import Unit
from research.evidence.work import run_all


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    wanted = _parser().parse_args(arguments)
    results, text = places(wanted, "evidence", "evidence_bundled.md")

    def work() -> int:
        failed = 0
        if not wanted.render:
            plan = [unit for unit in units_of(QUICK if wanted.quick else FULL) if _wanted(unit, wanted.only)]
            failed = _run(Ledger(results, plan, fresh=wanted.fresh), plan, wanted.workers)
        page.write(results, text, text.with_suffix(""))
        print(f"{text} written from {results}")
        return 1 if failed else 0

    return status_of(work)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("evidence", __doc__, "a folder of the same name")
    parser.add_argument("--only", nargs="+", choices=page.EXPERIMENTS, help="these experiments only")
    parser.add_argument("--fresh", action="store_true", help="do not go on with a run that was broken off")
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
        show_progress(count, len(waiting), started, unit.name)
    return failed


if __name__ == "__main__":
    sys.exit(main())
