"""Write tables of result files, in the terminal and in the documents: ``python -m loopserve.bench.report README.md``.

A table stands between markers that name its file. Demonstration: ``<!-- demo: FILE -->`` (``demo, short`` for three
columns) ... ``<!-- end of demo -->``. Rows of ``loopserve bench``: ``<!-- speed:
FILE op,op tokens not "text" "text" -->`` ... ``<!-- end of speed -->``, for all operations or for those named, over all
lengths or from a number of tokens on, without cases that contain one of the texts. Rows of ``benchmarks/peers``:
``<!-- peers: FILE -->`` ... ``<!-- end of peers -->``, and ``servers`` alike.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from loopserve.bench.demo_cells import BOOK_COLUMNS, book_cells
from loopserve.bench.peers import peers_markdown, servers_markdown
from loopserve.bench.rows import Row, latest, read_rows

COLUMNS = ("op", "case", "dtype", "by", "density", "ms (20-80 %)", "x SDPA", "x own dense", "error", "note")
_PLACE = re.compile(r"(<!-- demo(, short)?: (\S+) -->).*?(<!-- end of demo -->)", re.DOTALL)
_SPEED = re.compile(
    r"(<!-- speed: (\S+)(?: ([a-z_,]+))?(?: (\d+))?(?: not((?: \"[^\"]+\")+))? -->).*?<!-- end of speed -->", re.DOTALL
)

_PEERS = re.compile(r"(<!-- (peers|servers): (\S+) -->).*?<!-- end of \2 -->", re.DOTALL)


def table(rows: Iterable[Row], ops: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Return a line per row under ``COLUMNS``, the newest of several rows of the same measurement. ops: names, all by default."""
    return [line(row) for row in latest(rows) if (not ops or row["op"] in ops) and "shape" in row]


def line(row: Row) -> tuple[str, ...]:
    """Return one row as text."""
    spread = f"{_ms(row['median_ms'])} ({_ms(row['q20_ms'])}-{_ms(row['q80_ms'])})" if "median_ms" in row else "-"
    pattern = row.get("pattern") or {}
    density = pattern.get("cell_density")
    error = row.get("rel_err_pattern")
    return (
        row["op"],
        case(row),
        row["dtype"],
        row.get("stack") or row["impl"] or "-",
        "-" if density is None else f"{density:.1%}",
        spread,
        _times(row.get("ratio_sdpa")),
        _times(row.get("ratio_own_dense")),
        "-" if error is None else f"{error:.0e}",
        note(row),
    )


def case(row: Row) -> str:
    """Return ``8 heads, D 64, 512 new of 16K``: the sizes, and the inputs where they are not synthetic."""
    shape = row["shape"]
    heads = f"{shape['q_heads']}/{shape['kv_heads']} heads, D {shape['head_dim']}"
    new, total = shape["m"], shape["n"]
    place = count(total) if new in (1, total) else f"{count(new)} new of {count(total)}"
    parts = [f"{shape['layers']} layers, {heads}" if "layers" in shape else heads, place]
    if shape.get("batch", 1) > 1:
        parts.append(f"batch {shape['batch']}")
    if "turn" in shape:
        parts.append(f"turn {shape['turn']}")
    if row["data"].startswith("model"):
        parts.append("the bundled model's heads")
    elif "planted" in row["data"]:
        parts.append("planted lines" + (", chosen on flat attention" if "own flat attention" in row["data"] else ""))
    return ", ".join(parts)


def note(row: Row) -> str:
    """Return the remarks of a row: parity failures, scaled baselines, growth, selection share."""
    remarks = []
    if row.get("parity") != "ok":
        remarks.append(f"PARITY FAILED: {row.get('error', '')}")
    if "scaled_from_heads" in row:
        remarks.append(f"dense on {row['scaled_from_heads']} heads, scaled")
    if "growth" in row and row.get("growth_from") != row["shape"]["n"]:
        remarks.append(f"{row['growth']:.2f} times {count(row['growth_from'])}")
    if "choosing_share" in row:
        remarks.append(f"choosing {row['choosing_share']:.0%}")
    if "ratio_eager" in row:
        remarks.append(f"{_times(row['ratio_eager'])} eager")
    return "; ".join(remarks)


def break_even(rows: Iterable[Row], op: str = "sparse_prefill") -> list[str]:
    """Return one line per kind of row with the length from which a first turn is faster than the fastest SDPA.

    Between two lengths it is interpolated by the straight line through their ratios on logarithmic scales.
    """
    whole = [row for row in latest(rows) if row["op"] == op and "ratio_sdpa" in row and _first_turn(row)]
    found = []
    for kind, group in groupby(sorted(whole, key=_kind), key=_kind):
        points = sorted((row["shape"]["n"], row["ratio_sdpa"]) for row in group)
        found.append(f"{', '.join(kind)}: {_crossing(points)}")
    return found


def _first_turn(row: Row) -> bool:
    return bool(row["shape"]["m"] == row["shape"]["n"])


def _kind(row: Row) -> tuple[str, str, str, str]:
    inputs = row["data"].split(",")[0]
    return f"D {row['shape']['head_dim']}", row["dtype"], row["impl"], inputs


def crossing(points: Sequence[tuple[int, float]]) -> int | None:
    """Return the length at which ratios, given by rising length, reach 1; None if they never do, or from the first on."""
    for (shorter, below), (longer, above) in pairwise(points):
        if below < 1 <= above:
            part = -math.log(below) / (math.log(above) - math.log(below))
            return round(float(shorter * (longer / shorter) ** part))
    return None


def _crossing(points: Sequence[tuple[int, float]]) -> str:
    if points[0][1] >= 1:
        return f"faster at {count(points[0][0])}, the shortest measured"
    length = crossing(points)
    if length is not None:
        return f"from about {count(length)} on"
    return f"not up to {count(points[-1][0])} ({points[-1][1]:.2f} times as fast there)"


def machines(rows: Iterable[Row]) -> str:
    """Return the conditions of the rows in one sentence: device, threads, versions, commits, days."""
    rows = list(rows)

    def each(values: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    versions = (f"torch {row['versions']['torch']}, triton {row['versions'].get('triton', '-')}" for row in rows)
    return (
        f"{each(row['device'] for row in rows)}; {each(row['threads'] for row in rows)} thread(s); {each(versions)}; "
        f"commit {each(row['commit'] for row in rows)}; {each(row['date'][:10] for row in rows)}"
    )


def markdown(rows: Iterable[Row], ops: Sequence[str] = (), shortest: int = 0, without: Sequence[str] = ()) -> str:
    """Return a Markdown table with a line on the machine, of rows over at least ``shortest`` tokens.

    Cases that contain one of ``without`` are left out, and so are baselines unless all operations are requested.
    """
    shown = [row for row in latest(rows) if "shape" in row and row["shape"]["n"] >= shortest]
    shown = [row for row in shown if not any(text in case(row) for text in without)]
    if ops:
        shown = [row for row in shown if row["op"] in ops and not _is_baseline(row)]
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in line(row))} |" for row in shown]
    caption = (
        f"Paired runs in one process, medians; ratios are times faster. {machines(shown)}." if shown else "No rows."
    )
    return "\n".join([*lines, "", caption])


def _is_baseline(row: Row) -> bool:
    stack: str = row.get("stack", "")
    return stack == "dense" or stack.startswith("transformers")


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def count(tokens: int) -> str:
    """Return ``16K``, or the number."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 and tokens else f"{tokens:,}"


def demo_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of a demonstration, with its settings and machine."""
    if "conversation" in result["settings"]:
        return _book_figures(result)
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
    settings = result["settings"]
    caption = (
        f"{settings['dialogues']} held-out dialogues of {settings['tokens']:,} tokens and {settings['turns']} turns, one and two keys "
        f"asked, {_budget_and_machine(result)}, float32. `loopserve demo --tokens {settings['tokens']} --turns {settings['turns']} "
        f"--dialogues {settings['dialogues'] // 3} --seed {settings['seed']} --format json`"
    )
    return "\n".join([*lines, "", caption])


def _budget_and_machine(result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    return (
        f"budget {' or '.join(map(str, settings['budget']))} pairs per head (the larger where the answer counts in); "
        f"{machine['processor']}, {machine['threads']} thread(s), torch {machine['torch']}"
    )


def short_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of three columns for the front page, with the settings of the measurement."""
    if "conversation" in result["settings"]:
        return book_table(result)
    lines = ["| stack | answers right | KV pairs attended per output token |", "|---|---|---|"]
    for name, row in result["stacks"].items():
        lines.append(f"| `{name}` | {row['right']} of {row['asked']} | {row['attended_fraction']:.1%} |")
    settings = result["settings"]
    caption = f"{settings['dialogues']} dialogues of {settings['tokens']:,} tokens and {settings['turns']} turns, a question in each."
    return "\n".join([*lines, "", caption])


def book_table(result: dict[str, Any]) -> str:
    """Return a Markdown table of a conversation about a novel: same answers, pairs read, time; with its settings and machine."""
    lines = [f"| stack | {' | '.join(BOOK_COLUMNS)} |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {' | '.join(book_cells(row))} |" for name, row in result["stacks"].items()]
    settings, machine = result["settings"], result["machine"]
    caption = (
        f"One conversation about Moby-Dick with `{settings['model']}`: {settings['tokens']:,} tokens, {settings['turns']} turns, a "
        f"question in each, {settings['dtype']}, {machine['threads']} thread(s). "
        f"`loopserve demo --dtype {settings['dtype']}` repeats it."
    )
    return "\n".join([*lines, "", caption])


def _book_figures(result: dict[str, Any]) -> str:
    """Return a Markdown table of a conversation about a novel with all figures, and its settings."""
    lines = [
        "| stack | right | same as dense | prefill cells / tiles | KV pairs attended | KV bytes per output token | prefill | TPOT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["stacks"].items():
        read = row["kv_bytes_per_token"] / row["dense_kv_bytes_per_token"]
        lines.append(
            f"| `{name}` | {row['right']} of {row['asked']} | {row['same']} of {row['asked']} "
            f"| {row['prefill_cell_density']:.1%} / {row['prefill_tile_density']:.1%} | {row['attended_fraction']:.1%} | {read:.1%} "
            f"| {row['ttft_ms'] / 1000:.1f} s | {row['tpot_ms']:.0f} ms |"
        )
    settings = result["settings"]
    caption = (
        f"{settings['tokens']:,} tokens, {settings['turns']} turns, {_budget_and_machine(result)}, {settings['dtype']}. "
        "`loopserve demo --format json`"
    )
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

    def beside(match: re.Match[str]) -> str:
        begin, kind, file = match.groups()
        write = peers_markdown if kind == "peers" else servers_markdown
        rows = read_rows(root / file) if (root / file).exists() else []
        return f"{begin}\n{write(rows)}\n<!-- end of {kind} -->"

    return _PEERS.sub(beside, _SPEED.sub(speed, _PLACE.sub(table, text)))


if __name__ == "__main__":
    for each in map(Path, sys.argv[1:]):
        each.write_text(renew(each.read_text(encoding="utf-8"), Path.cwd()), encoding="utf-8")
