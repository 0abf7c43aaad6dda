"""Measure how stacks agree with dense attention: KL of the next token's distribution, likeliest token, perplexity.

    python -m research.evidence_real.agreement loopserve quest:page=4 loopserve:key_bits=4,page_budget=180

measures stacks side by side on texts whose continuation is teacher-forced. An option without a dot is one of the decode policy,
``prefill.alpha=0.95`` one of the prefill policy. ``--file`` takes texts of your own, ``--turns`` gives a text over several turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from loopserve.api import load_stack
from loopserve.core.engine.engine import CHUNK_TOKENS
from loopserve.core.stack.stack import PolicyStack
from research.evidence.words import table
from research.evidence_real import dialogues
from research.evidence_real.case import FORCED, MODEL, Case, loaded
from research.evidence_real.comparison import Found
from research.evidence_real.stacks import at_share, with_options
from research.evidence_real.summary import HEADER, Agreement, row
from research.evidence_real.texts import KINDS, TEXTS, text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the stacks that the command line names, and print a table for each length."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.turns > 1 and given.phase == "prefill":
        parser.error("--turns: answers of several turns are decoded, --phase is decode or both")
    for tokens in given.tokens:
        found: dict[str, list[Found]] = {}
        kinds: list[str] = []
        for kind, content in _texts(given):
            kinds.append(kind)
            started = time.monotonic()
            for name, part in _measured(content, given, tokens):
                if "error" in part:
                    print(f"{name}: {part['error']}", flush=True)
                else:
                    found.setdefault(name, []).append(part | {"kind": kind})
            print(f"{kind}, {tokens} tokens: {time.monotonic() - started:.0f} s", flush=True)
        rows = [row(name, Agreement(parts)) for name, parts in found.items()]
        rows += [
            row(f"{name}, {kind}", Agreement([each for each in parts if each["kind"] == kind]))
            for name, parts in found.items()
            for kind in dict.fromkeys(kinds)
            if len(set(kinds)) > 1
        ]
        print(f"\n{tokens} tokens, {len(kinds)} texts\n\n{table(HEADER, rows)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m research.evidence_real.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stacks", nargs="+", help="NAME, NAME:option=value,... or a stack file")
    parser.add_argument(
        "--phase", choices=("decode", "prefill", "both"), default="decode", help="what is sparse (default decode)"
    )
    parser.add_argument(
        "--share", type=float, default=0.05, help="budget as a share of the context; 0 = as the stack has it"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="lengths of the prompt")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--texts", type=int, default=2, help="texts of each kind, 1 or 2")
    parser.add_argument("--file", type=Path, nargs="+", help="files of plain text, instead of the kinds")
    parser.add_argument("--forced", type=int, default=FORCED, help="teacher-forced tokens of each text")
    parser.add_argument(
        "--turns",
        type=int,
        default=1,
        help=f"turns that a text is given in; every answer is the {dialogues.ANSWER} tokens that follow",
    )
    parser.add_argument("--chunk", type=int, default=CHUNK_TOKENS, help="most tokens of one pass of a sparse prefill")
    parser.add_argument("--model", default=MODEL, help="as `loopserve run` takes it")
    return parser


def _texts(given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield kind and content of each text; a file is a kind of its own."""
    if given.file:
        yield from ((path.name, path.read_text("utf-8")) for path in given.file)
        return
    for kind in given.kinds:
        for number in range(min(given.texts, len(TEXTS[kind]))):
            yield kind, text(kind, number)


def _measured(content: str, given: argparse.Namespace, tokens: int) -> Iterable[tuple[str, Found]]:
    """Yield by stack, or by stack and turn, how it agrees with dense attention on one text."""
    outputs = given.forced if given.turns == 1 else dialogues.ANSWER

    def sized(stack: PolicyStack) -> PolicyStack:
        return at_share(stack, given.share, tokens, outputs) if given.share else stack

    dense = {"policy": "dense"}
    only: Callable[[PolicyStack], PolicyStack] = lambda stack: load_stack(stack.describe() | {"prefill": dense})  # noqa: E731
    stacks = {spec: with_options(spec) for spec in given.stacks}
    if given.phase == "decode":
        stacks = {name: only(stack) for name, stack in stacks.items()}
    if given.phase != "prefill":
        stacks = {name: sized(stack) for name, stack in stacks.items()}
    if given.turns > 1:
        found = dialogues.measure(*loaded(given.model), content, tokens, stacks, given.turns, chunk_tokens=given.chunk)
        return (
            (f"{name}, turn {number}", part)
            for name, parts in found.items()
            for number, part in enumerate(parts, start=1)
        )
    case = Case.of(given.model, content, tokens, given.forced, chunk_tokens=given.chunk)
    if given.phase == "prefill":
        return ((name, case.prefilling(stack)) for name, stack in stacks.items())
    return case.whole(stacks) if given.phase == "both" else case.decoding(stacks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
