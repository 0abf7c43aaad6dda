"""Count the files and lines that one decode step runs through: what a reader has to open to follow it.

``python -m research.reading_cost [STACK ...]`` prints, for the bundled model, the files of loopserve of which some function runs during
one decode step: the lines of those functions, and of the whole file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import loopserve
from loopserve import Engine
from loopserve.core.engine.sampling import SamplingConfig

PACKAGE = Path(loopserve.__file__).parent


def files_of_a_step(stack: str) -> dict[str, tuple[int, int]]:
    """Return (lines of the functions run, lines of the file) of each file that a decode step of a long conversation runs through."""
    engine = Engine.from_pretrained("demo", stack).token_engine
    prompt = [8 + number % 500 for number in range(5400)]  # long enough for selections to act
    found: dict[str, set[CodeType]] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            found.setdefault(str(path.relative_to(PACKAGE)), set()).add(frame.f_code)

    tokens = engine.generate(engine.session(), prompt, SamplingConfig(max_new_tokens=8), frozenset())
    for _ in range(3):
        next(tokens)
    sys.setprofile(note)
    try:
        next(tokens)
    finally:
        sys.setprofile(None)
    tokens.close()
    return {
        name: (sum(map(_lines, codes)), len((PACKAGE / name).read_text(encoding="utf-8").splitlines()))
        for name, codes in found.items()
    }


def _lines(code: CodeType) -> int:
    numbers = [number for _, _, number in code.co_lines() if number]
    return max(numbers) - min(numbers) + 1


def main() -> None:
    """Print a table per stack."""
    parser = argparse.ArgumentParser(prog="python -m research.reading_cost", description=__doc__)
    parser.add_argument("stacks", nargs="*", default=["dense", "loopserve"], help="names of stacks")
    for stack in parser.parse_args().stacks:
        found = files_of_a_step(stack)
        for name, (run, lines) in sorted(found.items()):
            print(f"{run:5d} of {lines:4d}  {name}")
        run, lines = (sum(each[part] for each in found.values()) for part in (0, 1))
        print(f"{stack}: {len(found)} files, {run} lines of functions, {lines} lines of files\n")


if __name__ == "__main__":
    main()
