"""From result files to the tables in the documents: ``python -m loopserve.bench.report README.md``.

A table stands between markers that name its file: ``<!-- demo: FILE -->`` (``demo, short`` for three columns) ...
``<!-- end of demo -->``, or ``<!-- speed:
FILE op,op tokens not "text" "text" -->`` ... ``<!-- end of speed -->`` for rows of ``loopserve bench``: of all operations or of those
named, over all lengths or from so many tokens on, without cases that contain one of the texts.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from loopserve.bench.rows import read_rows
from loopserve.bench.speed.table import markdown

_PLACE = re.compile(r"(<!-- demo(, short)?: (\S+) -->).*?(<!-- end of demo -->)", re.DOTALL)
_SPEED = re.compile(
    r"(<!-- speed: (\S+)(?: ([a-z_,]+))?(?: (\d+))?(?: not((?: \"[^\"]+\")+))? -->).*?<!-- end of speed -->", re.DOTALL
)


def demo_table(result: dict[str, Any]) -> str:
    """A markdown table of a demonstration, and how and where it was had."""
    lines = [
        "| stack | right, question at begin / middle / end | prefill cells / tiles | KV pairs attended | KV bytes per output token "
        "| TTFT | TPOT |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["stacks"].items():
        right = " / ".join(f"{each['right']}" for each in row["positions"].values())
        asked = next(iter(row["positions"].values()))["asked"]
        read = row["kv_bytes_per_token"] / row["dense_kv_bytes_per_token"]
        lines.append(
            f"| `{name}` | {right} of {asked} each | {row['prefill_cell_density']:.1%} / {row['prefill_tile_density']:.1%} "
            f"| {row['attended_fraction']:.1%} | {read:.1%} | {row['ttft_ms']:.0f} ms | {row['tpot_ms']:.1f} ms |"
        )
    settings, machine = result["settings"], result["machine"]
    said = (
        f"{settings['dialogues']} held-out dialogues of {settings['tokens']:,} tokens and {settings['turns']} turns, one and two keys "
        f"asked, budget {' or '.join(map(str, settings['budget']))} pairs per head (the larger where the answer counts in); "
        f"{machine['processor']}, {machine['threads']} thread(s), torch "
        f"{machine['torch']}, float32. `loopserve demo --tokens {settings['tokens']} --turns {settings['turns']} "
        f"--dialogues {settings['dialogues'] // 3} --seed {settings['seed']} --format json`"
    )
    return "\n".join([*lines, "", said])


def short_table(result: dict[str, Any]) -> str:
    """Return a markdown table of three columns for the front page, and what was measured."""
    lines = ["| stack | answers right | KV pairs attended per output token |", "|---|---|---|"]
    for name, row in result["stacks"].items():
        lines.append(f"| `{name}` | {row['right']} of {row['asked']} | {row['attended_fraction']:.1%} |")
    settings = result["settings"]
    said = f"{settings['dialogues']} dialogues of {settings['tokens']:,} tokens and {settings['turns']} turns, a question in each."
    return "\n".join([*lines, "", said])


def renew(text: str, root: Path) -> str:
    """A document with each table made again from the result file that its marker names, relative to ``root``."""

    def table(match: re.Match[str]) -> str:
        begin, short, file, end = match.groups()
        result = json.loads((root / file).read_text(encoding="utf-8"))
        return f"{begin}\n{short_table(result) if short else demo_table(result)}\n{end}"

    def speed(match: re.Match[str]) -> str:
        ops = tuple(match.group(3).split(",")) if match.group(3) else ()
        without = re.findall(r'"([^"]+)"', match.group(5) or "")
        shown = markdown(read_rows(root / match.group(2)), ops, int(match.group(4) or 0), without)
        return f"{match.group(1)}\n{shown}\n<!-- end of speed -->"

    return _SPEED.sub(speed, _PLACE.sub(table, text))


if __name__ == "__main__":
    for each in map(Path, sys.argv[1:]):
        each.write_text(renew(each.read_text(encoding="utf-8"), Path.cwd()), encoding="utf-8")
