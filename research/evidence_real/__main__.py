"""``python -m research.evidence_real``: run what is not done yet, then write the page."""

from __future__ import annotations

import argparse
import sys
import time

from research.evidence.command import parser_of, places, show_progress, status_of
from research.evidence.units import Unit
from research.evidence_real import page
from research.evidence_real.case import MODEL
from research.evidence_real.ledger import Ledger
from research.evidence_real.plan import FULL, QUICK, units_of
from research.evidence_real.work import run_all


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    wanted = _parser().parse_args(arguments)
    results, text = places(wanted, "evidence_real", "evidence.md")

    def work() -> int:
        plan = units_of(QUICK if wanted.quick else FULL)
        ledger = Ledger(results)
        failed = 0
        if not wanted.render:
            chosen = [unit for unit in plan if wanted.only is None or unit.experiment in wanted.only]
            failed = _run(ledger, chosen, wanted)
            if not ledger.waiting(chosen):
                ledger.tidy(chosen)
        page.write(ledger, plan, text, text.with_suffix("").with_name(text.stem + "_real"))
        print(f"{text} written from {results}")
        return 1 if failed else 0

    return status_of(work)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("evidence_real", __doc__, "a folder beside it")
    parser.add_argument("--only", nargs="+", help="these experiments only")
    parser.add_argument(
        "--minutes", type=float, default=85.0, help="begin no further batch after so many minutes (default 85)"
    )
    parser.add_argument("--model", default=MODEL, help="where the model lies, if not under its name (default smollm2)")
    return parser


def _run(ledger: Ledger, plan: list[Unit], wanted: argparse.Namespace) -> int:
    """Run what is not done; how many units failed."""
    waiting, failed, count = ledger.waiting(plan), 0, 0
    started = time.monotonic()
    for rows in run_all(waiting, wanted.workers, wanted.model):
        for row in rows:
            ledger.add(row)
            failed += "error" in row["found"]
        count += len(rows)
        last = rows[-1]["unit"]
        where = " ".join(map(str, last.get("text", [last.get("seed")])))
        show_progress(count, len(waiting), started, f"{rows[-1]['experiment']}: {where}, {last['tokens']} tokens")
        if time.monotonic() - started > 60 * wanted.minutes:
            print("the time is over; the same command goes on from here", file=sys.stderr)
            break
    return failed


if __name__ == "__main__":
    sys.exit(main())
