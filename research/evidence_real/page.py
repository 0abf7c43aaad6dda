"""The page: a table of verdicts, then every section, all from stored rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from loopserve.core.errors import ConfigError
from research.evidence.units import Row, Unit, key_of
from research.evidence.words import minutes, table
from research.evidence_real import sections
from research.evidence_real.ledger import Ledger
from research.evidence_real.sections import Rows, Verdict

_HEAD = """# Evidence

Made by `make evidence-real` from the rows in `{results}`: every figure is written by rules from those rows, so a re-run renews the
page. Do not edit it. What the same claims look like on the small model that comes with loopserve is in
[evidence_bundled.md](evidence_bundled.md).

The model is SmolLM2-135M-Instruct (30 layers, 9 query and 3 KV heads of 64, 8,192 positions), in float32. Texts are natural, two of
each of three kinds: prose (chapters of a novel), technical (the Python language reference) and code (Python's standard library). The
model is asked to continue a text; the next {forced} tokens of it are teacher-forced, and its distribution of each next token is
compared with that under dense attention."""

_TERMS = """*KL*: divergence of the next token's distribution from dense attention's, in nats, mean per token. *Top-1*: share of tokens
for which the likeliest next token is the same. *Perplexity*: change of the text's perplexity. *Attended*: pairs that decode steps
attend to, of dense's. *Bytes*: KV bytes that decode steps read of those that dense attention reads, beside a store in bfloat16,
scoring and key summaries included; *all bytes*: with what is read before the first output, spread over the answer. *Cells*, *tiles*:
computed cells of the prefill's attention, and 64 x 64 tiles, of the causal ones. ± is a standard error, from the means of blocks of
16 tokens. Stacks attend to the given share of the pairs at the answer's middle, outputs included; `dense_below` is off, since a
preset's own would leave short prompts dense."""


def write(ledger: Ledger, plan: Sequence[Unit], text: Path, pictures: Path) -> None:
    """Write the page. ConfigError if it cannot be written."""
    try:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(render(ledger, plan), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{text}: cannot be written ({error.strerror})") from error


def render(ledger: Ledger, plan: Sequence[Unit]) -> str:
    """Return the page's text; what is planned and not measured is said to be missing."""
    wanted: dict[str, list[Unit]] = {}
    for unit in plan:
        wanted.setdefault(unit.experiment, []).append(unit)
    rows: Rows = {}
    for name, units in wanted.items():
        keys = {unit.key for unit in units}
        rows[name] = [row for row in ledger.rows(name) if key_of(row["unit"]) in keys]
    verdicts: list[Verdict] = []
    texts = []
    for title, section in _SECTIONS:
        said, found = section(rows)
        verdicts += found
        texts.append(f"## {title}\n\n{said}")
    forced = next(unit.spec["forced"] for unit in plan if "forced" in unit.spec)
    head = _HEAD.format(results=os.path.relpath(ledger.directory), forced=forced)
    lines = [[each.claim, each.word, each.figure, each.model] for each in verdicts]
    whole = [
        head,
        "## Verdicts\n\n" + table(["claim", "holds?", "figure", "model"], lines),
        _missing(wanted, rows),
        _TERMS,
        *texts,
        f"## How it was had\n\n{_made(rows)}",
    ]
    return "\n\n".join(part for part in whole if part) + "\n"


_SECTIONS: tuple[tuple[str, Callable[[Rows], tuple[str, list[Verdict]]]], ...] = (
    ("1. Decoding on few pairs", sections.decoding),
    ("2. Sparse prefill", sections.prefilling),
    ("3. What alpha gives", sections.alphas),
    ("4. Both phases together", sections.both),
    ("5. Numbers told turns before", sections.needles),
    ("6. The default stack's fields", sections.ablations),
    ("7. Conversations of several turns", sections.talks),
    ("8. The paper's claims about attention", sections.claims),
)


def _missing(wanted: dict[str, list[Unit]], rows: Rows) -> str:
    parts = []
    for name, units in wanted.items():
        done = {key_of(row["unit"]) for row in rows[name]}
        absent = Counter(unit.spec["tokens"] for unit in units if unit.key not in done)
        parts += [
            f"{name} at {tokens:,} tokens ({count} of {_planned(units, tokens)})" for tokens, count in absent.items()
        ]
    if not parts:
        return ""
    return f"Not measured, of what `make evidence-real` measures (texts times stacks): {'; '.join(parts)}."


def _planned(units: Sequence[Unit], tokens: int) -> int:
    return sum(unit.spec["tokens"] == tokens for unit in units)


def _made(rows: Rows) -> str:
    every = [row for found in rows.values() for row in found]
    if not every:
        return "Nothing was run yet."
    lines = [
        [name, str(len(found)), f"{_tokens(found):,}", minutes(sum(row["seconds"] for row in found))]
        for name, found in rows.items()
        if found
    ]
    lines.append(["all", str(len(every)), f"{_tokens(every):,}", minutes(sum(row["seconds"] for row in every))])
    made = [row["made"] for row in every]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(each[name]) for each in made}))

    failed = Counter((row["unit"]["label"], row["found"]["error"]) for row in every if "error" in row["found"])
    return "\n\n".join(
        [
            table(["experiment", "texts times stacks", "tokens compared", "time of one core"], lines),
            f"{all_of('device')}, one thread; torch {all_of('torch')}, Python {all_of('python')}; commit {all_of('commit')}; "
            f"{min(each['date'] for each in made)} to {max(each['date'] for each in made)}. The technical texts and the code "
            "are those of this Python.",
            *(f"Failed {count} times: {label}: {error}" for (label, error), count in failed.items()),
        ]
    )


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row["found"].get("tokens", 0) for row in rows)
