"""``python -m research.evidence_real``: run what is not done yet, then write the page."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from loopserve.core.errors import LoopServeError
from research.evidence.units import Unit
from research.evidence_real import page
from research.evidence_real.case import MODEL
from research.evidence_real.ledger import Ledger
from research.evidence_real.plan import FULL, QUICK, units_of
from research.evidence_real.work import run_all


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    wanted = _parser().parse_args(arguments)
    here = Path("build/evidence-real") if wanted.quick else Path()
    results = wanted.results or (here / "rows" if wanted.quick else Path("benchmarks/results/evidence-real"))
    text = wanted.page or (here if wanted.quick else Path("docs")) / "evidence.md"
    try:
        plan = units_of(QUICK if wanted.quick else FULL)
        ledger = Ledger(results)
        failed = 0
        if not wanted.render:
            chosen = [unit for unit in plan if wanted.only is None or unit.experiment in wanted.only]
            failed = _run(ledger, chosen, wanted)
            if not ledger.waiting(chosen):
                ledger.tidy(chosen)
        page.write(ledger, plan, text, text.with_suffix("").with_name(text.stem + "_real"))
    except LoopServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("broken off; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{text} written from {results}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m research.evidence_real", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, into build/evidence-real: shows that it runs, proves nothing"
    )
    parser.add_argument("--only", nargs="+", help="these experiments only")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page from what is there")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument(
        "--minutes", type=float, default=85.0, help="begin no further batch after so many minutes (default 85)"
    )
    parser.add_argument("--model", default=MODEL, help="where the model lies, if not under its name (default smollm2)")
    parser.add_argument("--results", type=Path, help="folder of the rows")
    parser.add_argument("--page", type=Path, help="file of the page; its pictures go into a folder beside it")
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
        gone = time.monotonic() - started
        left = gone / count * (len(waiting) - count)
        last = rows[-1]["unit"]
        print(
            f"{count}/{len(waiting)}  {_clock(gone)} gone, about {_clock(left)} left  {rows[-1]['experiment']}: "
            f"{' '.join(map(str, last.get('text', [last.get('seed')])))}, {last['tokens']} tokens",
            file=sys.stderr,
            flush=True,
        )
        if gone > 60 * wanted.minutes:
            print("the time is over; the same command goes on from here", file=sys.stderr)
            break
    return failed


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
