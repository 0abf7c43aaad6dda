"""The page: a table of verdicts, then every section, all from stored rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from loopserve.core.errors import ConfigError
from research.evidence.units import Row, Unit, key_of
from research.evidence.words import minutes, table
from research.evidence_real.case import FORCED
from research.evidence_real.ledger import Ledger
from research.evidence_real.plan import READ
from research.evidence_real.sections import (
    alphas,
    attention,
    both,
    conversations,
    decoding,
    fields,
    numbers,
    prefill,
)
from research.evidence_real.sections.rows import Rows
from research.evidence_real.sections.verdict import Verdict

_HEAD = """# Evidence

Made by `make evidence-real` from the rows in `{results}`: every figure is written by rules from those rows, so a re-run renews the
page. Do not edit it. What the same claims look like on the small model that comes with loopserve is in
[evidence_bundled.md](evidence_bundled.md).

The model is SmolLM2-135M-Instruct (30 layers, 9 query and 3 KV heads of 64, 8,192 positions), in float32. Texts are natural, two of
each of three kinds: prose (chapters of a novel), technical (the Python language reference) and code (Python's standard library). The
model is asked to continue a text; the next {forced} tokens of it are teacher-forced ({read} where only the prefill is sparse), and
its distribution of each next token is compared with that under dense attention. Stacks of your own are measured the same way by
`python -m research.evidence_real.agreement STACK...`.

Only rows of today's settings are shown: what a preset has changed since its row was measured is missing until it is measured again, and
the page's end names what is missing. A verdict needs all three kinds of text, or 60 answers: fewer are too few to tell."""

_TERMS = """*Tokens*: how many are compared. *KL*: divergence of the next token's distribution from dense attention's, in nats, mean
per token. *Top-1*: share of tokens for which the likeliest next token is the same. *Perplexity*: change of the text's perplexity.
*Attended*: pairs that decode steps attend to, of dense's. *Bytes*: KV bytes that decode steps read of those that dense attention
reads, beside a store in bfloat16, scoring and key summaries included; *all bytes*: with what is read before the first output, spread
over the answer. *Cells*, *tiles*: computed cells of the prefill's attention, and 64 x 64 tiles, of the causal ones. ± is a standard
error, from the means of blocks of 16 tokens. Stacks attend to the given share of the pairs at the answer's middle, the answer's own
tokens included; `dense_below` is off, since a preset's own would leave short prompts dense."""


def write(ledger: Ledger, plan: Sequence[Unit], text: Path, pictures: Path) -> None:
    """Write the page. ConfigError if it cannot be written."""
    try:
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(render(ledger, plan), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{text}: cannot be written ({error.strerror})") from error


def render(ledger: Ledger, plan: Sequence[Unit]) -> str:
    """Return the page's text from the rows of the plan; what is planned and not measured is said to be missing."""
    units = {name: [unit for unit in plan if unit.experiment == name] for name in EXPERIMENTS}
    rows: Rows = {name: planned(ledger.rows(name), units[name]) for name in EXPERIMENTS}
    verdicts: list[Verdict] = []
    texts = []
    for title, section in _SECTIONS:
        said, found = section(rows)
        verdicts += found
        texts.append(f"## {title}\n\n{said}")
    lines = [[each.claim, each.word, each.figure, each.model] for each in verdicts]
    whole = [
        _HEAD.format(results=os.path.relpath(ledger.directory), forced=FORCED, read=READ),
        "## Verdicts\n\n" + table(["claim", "holds?", "figure", "model"], lines),
        _TERMS,
        *texts,
        f"{LAST}\n\n{_made(rows)}",
        _missing(plan, rows),
    ]
    return "\n\n".join(part for part in whole if part) + "\n"


EXPERIMENTS = (
    "decode", "prefill", "coverage", "needles", "needles_whole", "both", "decode_ablations", "prefill_ablations", "dialogues",
    "claims",
)  # fmt: skip
LAST = "## How it was had"


def planned(rows: Sequence[Row], plan: Sequence[Unit]) -> list[Row]:
    """Return the latest row of each unit of the plan: a row of a stack that changed since is not the stack's any more."""
    order = {unit.key: number for number, unit in enumerate(plan)}
    latest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda each: str(each["made"]["date"])):
        if (key := key_of(row["unit"])) in order:
            latest[key] = row
    return [latest[key] for key in sorted(latest, key=order.__getitem__)]


_SECTIONS: tuple[tuple[str, Callable[[Rows], tuple[str, list[Verdict]]]], ...] = (
    ("1. Decoding on few pairs", decoding.section),
    ("2. Sparse prefill", prefill.section),
    ("3. What alpha gives", alphas.section),
    ("4. Both phases together", both.section),
    ("5. Numbers stated turns before", numbers.section),
    ("6. The default stack's fields", fields.section),
    ("7. Conversations of several turns", conversations.section),
    ("8. The paper's claims about attention", attention.section),
)


def _missing(plan: Sequence[Unit], rows: Rows) -> str:
    done = {key_of(row["unit"]) for found in rows.values() for row in found}
    wanted: dict[tuple[str, int], list[Unit]] = {}
    for unit in plan:
        wanted.setdefault((unit.experiment, unit.spec["tokens"]), []).append(unit)
    parts = [
        f"{name} at {tokens:,} tokens ({absent} of {len(units)})"
        for (name, tokens), units in sorted(wanted.items())
        if (absent := sum(unit.key not in done for unit in units))
    ]
    if not parts:
        return ""
    return f"Not measured with today's settings, of what `make evidence-real` measures (texts times stacks): {'; '.join(parts)}."


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
