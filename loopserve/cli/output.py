"""Print figures and errors, as text for people or as JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200  # a pipe has no width of its own, and cells should not be cut there


def console() -> Console:
    """Return the console of standard output, as wide as the terminal."""
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if narrow else _PIPE_WIDTH)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


_json_wanted = ContextVar("json_wanted", default=False)


def remember_json(wanted: bool) -> None:
    """Record whether this run prints JSON, so that errors are printed as JSON as well."""
    _json_wanted.set(wanted)


def print_error(text: str, kind: str) -> None:
    """Print an error on stderr, one line each, and as a JSON object on stdout if the command prints JSON."""
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    if _json_wanted.get():
        print_json({"error": text, "type": kind})


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"


def size(value: float | None) -> str:
    """Return bytes as text with a binary unit."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def turn_line(stats: Mapping[str, Any]) -> str:
    """Return one turn's figures (``TurnStats.as_dict``) on one line."""
    return " · ".join(
        (
            f"turn {stats['turn'] + 1}: {stats['prompt_tokens']} new + {stats['reused_tokens']} reused tokens, "
            f"{stats['output_tokens']} out",
            f"TTFT {milliseconds(stats['ttft_ms'])}",
            f"TPOT {milliseconds(stats['tpot_ms'])}",
            f"prefill density {percent(stats['prefill_cell_density'])}",
            f"coverage {percent(stats['coverage_estimated'])}",
            f"attended {percent(stats['attended_fraction'])}",
            f"KV read {size(stats['kv_bytes_per_token'])}/token",
            f"held {size(stats['store_bytes'] + stats['active_bytes'])}",
            *([f"{stats['faults']:.0f} faults of policies"] if stats.get("faults") else []),
        )
    )


def unexpected(error: Exception) -> str:
    """Return one line about an exception that is not a ``LoopServeError``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
