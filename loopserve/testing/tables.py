"""Markdown tables of all registered policies and their options, made from the classes.

``python -m loopserve.testing.tables docs/policies.md`` renews the part of a page between the two markers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from loopserve.core.registry import Registration

BEGIN = "<!-- made from the classes: python -m loopserve.testing.tables docs/policies.md -->"
END = "<!-- end of what is made from the classes -->"


def policy_tables(policies: Iterable[Registration]) -> str:
    """One row per policy, then one table of options per policy that has any."""
    found = list(policies)
    lines = ["| policy | kind | what it does | paper | unselected pairs |", "|---|---|---|---|---|"]
    lines += [_row(each) for each in found]
    for each in found:
        if each.config.model_fields:
            lines += ["", f"### {each.name} ({each.kind})", "", "| option | default | meaning |", "|---|---|---|"]
            lines += [_option(name, field) for name, field in each.config.model_fields.items()]
    return "\n".join(lines)


def _row(policy: Registration) -> str:
    paper = policy.paper.rsplit("/", 1)[-1]
    link = f"[arXiv {paper}]({policy.paper})" if policy.paper else "-"
    retentions = ", ".join(sorted(policy.capabilities.retentions)) if policy.kind == "decode" else "-"
    return f"| `{policy.name}` | {policy.kind} | {_cell(policy.summary)} | {link} | {retentions} |"


def _option(name: str, field: FieldInfo) -> str:
    default: Any = field.default
    shown = "required" if default is PydanticUndefined else f"`{default}`"
    return f"| `{name}` | {shown} | {_cell(field.description or '')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def renewed(page: str, policies: Iterable[Registration]) -> str:
    """A page with the part between its markers made anew. ValueError if it has no markers."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{policy_tables(policies)}\n\n{END}{rest.split(END, 1)[1]}"


def main(path: str) -> None:
    from loopserve.core.registry import Registry
    from loopserve.policies import loopserve_register_policies

    registry = Registry()
    loopserve_register_policies(registry)
    page = Path(path)
    page.write_text(renewed(page.read_text("utf-8"), registry), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
