"""Write tables of result files into the documents: ``python -m loopserve.bench.report README.md``.

A table stands between markers that name its file. Demonstration: ``<!-- demo: FILE -->`` (``demo, short`` for three
columns) ... ``<!-- end of demo -->``. Rows of ``loopserve bench``: ``<!-- speed: FILE op,op tokens not "text" "text"
-->`` ... ``<!-- end of speed -->``, for all operations or for those named, over all lengths or from a number of tokens
on, without cases that contain one of the texts.
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
    """Return a Markdown table of a demonstration, with its settings and machine."""
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
    caption = (
        f"{settings['dialogues']} held-out dialogues of {settings['tokens']:,} tokens and {settings['turns']} turns, one and two keys "
        f"asked, budget {' or '.join(map(str, settings['budget']))} pairs per head (the larger where the answer counts in); "
        f"{machine['processor']}, {machine['threads']} thread(s), torch "
        f"{machine['torch']}, float32. `loopserve demo --tokens {settings['tokens']} --turns {settings['turns']} "
        f"--dialogues {settings['dialogues'] // 3} --seed {settings['seed']} --format json`"
    )
    return "\n".join([*lines, "", caption])


def short_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of three columns for the front page, with the settings of the measurement."""
    lines = ["| stack | answers right | KV pairs attended per output token |", "|---|---|---|"]
    for name, row in result["stacks"].items():
        lines.append(f"| `{name}` | {row['right']} of {row['asked']} | {row['attended_fraction']:.1%} |")
    settings = result["settings"]
    caption = f"{settings['dialogues']} dialogues of {settings['tokens']:,} tokens and {settings['turns']} turns, a question in each."
    return "\n".join([*lines, "", caption])


def renew(text: str, root: Path) -> str:
    """Return a document with each table made again from the result file that its marker names, relative to ``root``."""

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
