"""The page: every section from stored rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loopserve.core.errors import ConfigError
from research.evidence import (
    attention_map,
    both,
    concentration,
    coverage,
    goal,
    moving,
    overlap,
    position,
    prefill,
    sensitivity,
    turns,
)
from research.evidence.ledger import rows_of
from research.evidence.pictures import Pictures
from research.evidence.units import Row
from research.evidence.words import minutes, table

_HEAD = """# The paper's claims on the bundled model

Made by `make evidence` from the rows in `{results}`: every sentence with a figure is written by rules from those rows, so a re-run
renews the page. Do not edit it.

The model is the bundled one (`recall`, trained on synthetic recall dialogues, see [demo_model.md](demo_model.md)), the dialogues are
held out and have three turns unless said otherwise, and the history holds the model's own answers. Figures show
tendencies; [evidence.md](evidence.md) has the same claims on a pretrained model, and decides where the two disagree.
An answer is right if every word is. Standard errors (±) are those of a share with one right
and one wrong answer added. *Bytes* are KV bytes read per output token as a share of what dense attention reads, scoring and key
summaries included; *all bytes* includes what is read before the first output, spread over the answer. Attended pairs, cells and
tiles are as [architecture.md](architecture.md) defines them. Of the paper's results only what its public reviews say is known here,
so claims are tested by their direction."""

EXPERIMENTS = (
    concentration.NAME, overlap.NAME, position.NAME, moving.NAME, turns.NAME, coverage.NAME, prefill.NAME, attention_map.NAME,
    both.NAME, sensitivity.NAME, goal.NAME,
)  # fmt: skip


def write(results: Path, page: Path, pictures: Path) -> None:
    """Write the page and its pictures from the rows under ``results``. ConfigError if it cannot be written."""
    text = render({name: rows_of(results, name) for name in EXPERIMENTS}, Pictures(pictures, page), results)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{page}: cannot be written ({error.strerror})") from error


def render(rows: Rows, pictures: Pictures, results: Path) -> str:
    """The page's text; experiments without rows are said to be missing."""
    texts = [_HEAD.format(results=os.path.relpath(results))]
    for title, name, section in _SECTIONS:
        texts.append(f"## {title}\n\n{section(rows, pictures) if rows[name] else 'Not run to its end.'}")
    if any(rows.values()):
        texts.append(f"## How it was had\n\n{_made(rows)}")
    return "\n\n".join(texts) + "\n"


def _prefill(rows: Rows, pictures: Pictures) -> str:
    parts = [prefill.section(rows[prefill.NAME], rows[coverage.NAME], pictures)]
    if rows[attention_map.NAME]:
        parts.append(attention_map.section(rows[attention_map.NAME], pictures))
    return "\n\n".join(parts)


Rows = Mapping[str, Sequence[Row]]
"""Stored rows by experiment."""

_SECTIONS: tuple[tuple[str, str, Callable[[Rows, Pictures], str]], ...] = (
    ("The bar", goal.NAME, lambda rows, pictures: goal.section(rows[goal.NAME], pictures)),
    (
        "1. Attention is concentrated on few lines",
        concentration.NAME,
        lambda rows, pictures: concentration.section(rows[concentration.NAME], pictures),
    ),
    ("2. Which lines, the input decides", overlap.NAME, lambda rows, _: overlap.section(rows[overlap.NAME])),
    (
        "3. The question's position",
        position.NAME,
        lambda rows, pictures: position.section(rows[position.NAME], pictures),
    ),
    (
        "4. Answers that move through the context",
        moving.NAME,
        lambda rows, pictures: moving.section(rows[moving.NAME], pictures),
    ),
    ("5. Several turns", turns.NAME, lambda rows, pictures: turns.section(rows[turns.NAME], pictures)),
    ("6. Sparse prefill", prefill.NAME, _prefill),
    ("7. Both phases together", both.NAME, lambda rows, pictures: both.section(rows[both.NAME], pictures)),
    (
        "Sensitivity",
        sensitivity.NAME,
        lambda rows, pictures: sensitivity.section(rows[sensitivity.NAME], pictures),
    ),
)


def _made(rows: Rows) -> str:
    done = {name: found for name, found in rows.items() if found}
    every = [row for found in done.values() for row in found]
    spent = {name: sum(row["seconds"] for row in found) for name, found in done.items()}
    lines = [
        [name, str(len(done[name])), str(_answers(done[name])), minutes(seconds)] for name, seconds in spent.items()
    ]
    lines.append(["all", str(len(every)), str(sum(map(_answers, done.values()))), minutes(sum(spent.values()))])
    made = [row["made"] for row in every]
    devices = ", ".join(sorted({each["device"] for each in made}))
    commits = ", ".join(sorted({str(each["commit"]) for each in made}))
    versions = ", ".join(sorted({each["torch"] for each in made}))
    return "\n\n".join(
        [
            table(["experiment", "units", "answers", "time of one core"], lines),
            f"{devices}, one thread per unit, units shared among processes side by side, so times to first token are "
            f"of a busy machine; torch {versions}, float32; commit "
            f"{commits}; {min(each['date'] for each in made)} to {max(each['date'] for each in made)}.",
        ]
    )


def _answers(rows: Sequence[Row]) -> int:
    return sum(len(row["found"].get("answers", {}).get("right", [])) for row in rows)
