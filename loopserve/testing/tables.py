"""Write Markdown tables of all registered policies and their options, from their classes.

``python -m loopserve.testing.tables docs/policies.md README.md`` renews the part of each page between its markers: the
whole tables, or on the front page the short one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from loopserve.core.policy.registry import Registration

BEGIN = "<!-- made from the classes: python -m loopserve.testing.tables docs/policies.md README.md -->"
BEGIN_SHORT = (
    "<!-- the short table, made from the classes: python -m loopserve.testing.tables docs/policies.md README.md -->"
)
END = "<!-- end of what is made from the classes -->"


def policy_tables(policies: Iterable[Registration]) -> str:
    """Return one row per policy, then one table of options per policy that has any."""
    found = list(policies)
    lines = ["| policy | kind | what it does | paper | unselected pairs | needs |", "|---|---|---|---|---|---|"]
    lines += [_row(each) for each in found]
    for each in found:
        if each.config.model_fields:
            lines += ["", f"### {each.name} ({each.kind})", "", "| option | default | meaning |", "|---|---|---|"]
            lines += [_option(name, field) for name, field in each.config.model_fields.items()]
    return "\n".join(lines)


def short_table(policies: Iterable[Registration]) -> str:
    """Return one row per kind, each policy a link to its paper."""
    found = list(policies)
    lines = ["| phase | policies |", "|---|---|"]
    for kind in dict.fromkeys(each.kind for each in found):
        names = [f"[`{p.name}`]({p.paper})" if p.paper else f"`{p.name}`" for p in found if p.kind is kind]
        lines.append(f"| {kind} ({len(names)}) | {', '.join(names)} |")
    return "\n".join(lines)


def _row(policy: Registration) -> str:
    link = f"[{_cited(policy.paper)}]({policy.paper})" if policy.paper else "-"
    retentions = ", ".join(sorted(policy.capabilities.retentions)) if policy.kind == "decode" else "-"
    needs = ", ".join(sorted(policy.capabilities.needs)) or "-"
    return f"| `{policy.name}` | {policy.kind} | {_cell(policy.summary)} | {link} | {retentions} | {needs} |"


def _cited(paper: str) -> str:
    """Return how a paper is cited: its number at arXiv, or the site that has it."""
    where, number = paper.rsplit("/", 1)
    return f"arXiv {number}" if "arxiv.org" in where else where.split("//")[-1].split("/")[0]


def _option(name: str, field: FieldInfo) -> str:
    default: Any = field.default
    shown = "required" if default is PydanticUndefined else f"`{default}`"
    return f"| `{name}` | {shown} | {_cell(field.description or '')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def renewed(page: str, policies: Iterable[Registration]) -> str:
    """Return a page with the part between its markers replaced. Raises ValueError if it has no markers."""
    found = list(policies)
    for begin, made in ((BEGIN, policy_tables), (BEGIN_SHORT, short_table)):
        if begin in page and END in page:
            before, rest = page.split(begin, 1)
            return f"{before}{begin}\n\n{made(found)}\n\n{END}{rest.split(END, 1)[1]}"
    raise ValueError(f"the page needs the line {BEGIN!r} or {BEGIN_SHORT!r}, and {END!r}")


def main(*paths: str) -> None:
    from loopserve.core.policy.registry import Registry
    from loopserve.policies import loopserve_register_policies

    registry = Registry()
    loopserve_register_policies(registry)
    for path in paths:
        page = Path(path)
        page.write_text(renewed(page.read_text("utf-8"), registry), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
