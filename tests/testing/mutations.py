"""Each check of the conformance kit and the broken policy that it alone catches, as a table of the documentation.

``python -m tests.testing.mutations docs/conformance.md`` renews the page's table.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.testing.checks import CHECKS
from tests.testing import broken_form, broken_selections, broken_sessions, broken_sparsifiers
from tests.testing.broken_import import ImportsTransformers

BEGIN = "<!-- made from the checks: python -m tests.testing.mutations docs/conformance.md -->"
END = "<!-- end of what is made from the checks -->"
BROKEN: dict[str, type[Any]] = {
    **broken_form.BROKEN,
    "import_needs_no_transformers": ImportsTransformers,
    **broken_sparsifiers.BROKEN,
    **broken_selections.BROKEN,
    **broken_sessions.BROKEN,
}
_ASKED_OF = {None: "every policy", PrefillSparsifier: "a sparsifier", DecodeCompressor: "a compressor"}


def table() -> str:
    """One row per check, grouped by whom it is asked of."""
    lines = []
    for kind, asked in _ASKED_OF.items():
        lines += [f"### Asked of {asked}", "", "| check | what it says | only this check notices a policy that |"]
        lines += ["|---|---|---|"]
        for check in CHECKS:
            if check.kind is kind:
                lines.append(f"| `{check.name}` | {_cell(check.summary)} | {_cell(_fault(BROKEN[check.name]))} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _fault(policy: type) -> str:
    """What is wrong with it, as the end of a sentence."""
    text = " ".join((inspect.getdoc(policy) or "").split())
    if len(text.split()) < 3:
        return f"has no docstring but {text!r}"
    return text[0].lower() + text[1:].removesuffix(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def renewed(page: str) -> str:
    """A page with what stands between its markers made anew. ValueError if it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(*paths: str) -> None:
    for path in map(Path, paths):
        path.write_text(renewed(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
