"""The page: every section from stored rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loopserve.bench.evidence import (
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
from loopserve.bench.evidence.ledger import rows_of
from loopserve.bench.evidence.pictures import Pictures
from loopserve.bench.evidence.units import Row
from loopserve.bench.evidence.words import minutes, table
from loopserve.core.errors import ConfigError

_HEAD = """# The paper's claims, tested here

Made by `make evidence` from the rows in `{results}`: every sentence with a figure is written by rules from those rows, so a re-run
renews the page. Do not edit it.

The model is the bundled one (`recall`, trained on synthetic recall dialogues, see demo_model.md), the dialogues are held out and have three
turns unless said otherwise, and the history holds the model's own answers. Figures say which way the wind blows, not what an 8 B
model will do. An answer is right if every word is. Standard errors (±) are those of a share with one right and one wrong answer
added. *Bytes* are KV bytes read per output token as a share of what dense attention reads, scoring and key summaries included; *all bytes* includes what is read
before the first output, spread over the answer. Attended pairs, cells and tiles are as design.md defines them. Of the paper's results only what
its public reviews say is known here, so claims are tested by their direction."""

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


def render(rows: dict[str, list[Row]], pictures: Pictures, results: Path) -> str:
    """The page's text; experiments without rows are said to be missing."""

    def part(title: str, name: str, text: str) -> str:
        return f"## {title}\n\n{text if rows[name] else 'Not run.'}"

    def told(name: str, text: str) -> str:
        return text if rows[name] else ""

    def of(module: object, name: str) -> str:
        return module.section(rows[name], pictures) if rows[name] else ""  # type: ignore[attr-defined, no-any-return]

    prefilled = prefill.section(rows[prefill.NAME], rows[coverage.NAME], pictures) if rows[prefill.NAME] else ""
    overlapping = overlap.section(rows[overlap.NAME]) if rows[overlap.NAME] else ""
    goals = of(goal, goal.NAME)
    texts = [
        _HEAD.format(results=os.path.relpath(results)),
        part("The bar", goal.NAME, goals),
        part("1. Attention is concentrated on few lines", concentration.NAME, of(concentration, concentration.NAME)),
        part("2. Which lines, the input decides", overlap.NAME, overlapping),
        part("3. The question's position", position.NAME, of(position, position.NAME)),
        part("4. Answers that move through the context", moving.NAME, of(moving, moving.NAME)),
        part("5. Several turns", turns.NAME, of(turns, turns.NAME)),
        part("6. Sparse prefill", prefill.NAME, prefilled),
        told(attention_map.NAME, of(attention_map, attention_map.NAME)),
        part("7. Both phases together", both.NAME, of(both, both.NAME)),
        part("Sensitivity", sensitivity.NAME, of(sensitivity, sensitivity.NAME)),
        f"## How it was had\n\n{_made(rows)}" if any(rows.values()) else "",
    ]
    return "\n\n".join(text for text in texts if text) + "\n"


def _made(rows: dict[str, list[Row]]) -> str:
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
            f"{devices}, one thread per unit, units shared among processes side by side, so times to first token are of a busy machine; torch {versions}, float32; commit "
            f"{commits}; {min(each['date'] for each in made)} to {max(each['date'] for each in made)}.",
        ]
    )


def _answers(rows: Sequence[Row]) -> int:
    return sum(len(row["found"].get("answers", {}).get("right", [])) for row in rows)
