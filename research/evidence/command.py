"""Share what both commands of the evidence need: options, progress on stderr, and the exit status of a run that ends early."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loopserve.core.errors import LoopServeError


def parser_of(name: str, described: str | None, pictures: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every evidence has. pictures: where the page's pictures go, for the help."""
    parser = argparse.ArgumentParser(prog=f"python -m research.{name}", description=described)
    build = f"build/{name.replace('_', '-')}"
    parser.add_argument(
        "--quick", action="store_true", help=f"tiny sizes, into {build}: shows that it runs, proves nothing"
    )
    parser.add_argument("--render", action="store_true", help="run nothing, write the page from what is there")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument("--results", type=Path, help="folder of the rows")
    parser.add_argument("--page", type=Path, help=f"file of the page; its pictures go into {pictures}")
    return parser


def places(given: argparse.Namespace, name: str, page: str) -> tuple[Path, Path]:
    """Return the folder of the rows and the file of the page."""
    folder = name.replace("_", "-")
    here = Path("build") / folder if given.quick else Path()
    results = given.results or (here / "rows" if given.quick else Path("benchmarks/results") / folder)
    return results, given.page or (here if given.quick else Path("docs")) / page


def status_of(work: Callable[[], int]) -> int:
    """Do the work and return its exit status: 1 after an error of ours, 130 if it was interrupted."""
    try:
        return work()
    except LoopServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("broken off; the same command goes on from here", file=sys.stderr)
        return 130


def show_progress(count: int, total: int, started: float, what: str) -> None:
    """Print how many of all units are done, and how long the others may take. started: by ``time.monotonic``."""
    gone = time.monotonic() - started
    left = gone / count * (total - count)
    print(f"{count}/{total}  {_clock(gone)} gone, about {_clock(left)} left  {what}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
