"""Define ``loopserve policies check``: run the conformance kit on an installed policy or a class of the user's module."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption, Settings
from loopserve.cli.output import console, print_json, print_table
from loopserve.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from loopserve.testing.kit import Result


def check(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            metavar="NAME|PACKAGE:CLASS",
            help="A policy's name, as in `policies ls`, or module:Class (or module:object) of one not yet installed.",
        ),
    ],
    report: Annotated[bool, typer.Option("--report", help="Every check with what it says, not only failures.")] = False,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Run the conformance kit on a policy (both of that name); ends with 1 if a check fails.

    A class is tried under small options; for others make an object in your module and name that.
    """
    from loopserve.testing.kit import kind_of, report_on
    from loopserve.testing.subject import Subject

    policies = [_found(target)] if ":" in target else _registered(context.obj, target)
    subjects = [Subject(each) for each in policies]
    results = [report_on(each) for each in subjects]
    labels = [(str(kind_of(each)), str(getattr(each.policy, "name", "unnamed"))) for each in subjects]
    if format is Format.JSON:
        print_json({"policies": [_described(*label, found) for label, found in zip(labels, results, strict=True)]})
    else:
        for label, found in zip(labels, results, strict=True):
            _print(*label, found, report=report)
    if any(each.outcome == "failed" for found in results for each in found):
        raise typer.Exit(1)


def _registered(settings: Settings, name: str) -> list[Any]:
    return [each.policy for each in settings.plugins().registry.named(name)]


def _found(target: str) -> Any:
    """Return the class or object of ``module:Class``. The working directory is searched as well. Raises ConfigError."""
    name, _, path = target.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # code of somebody else may raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(f"{target}: cannot import {name!r}: {type(error).__name__}: {reason}") from error
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise ConfigError(f"{target}: {name!r} has no {path!r}{did_you_mean(path, _policies_in(module))}")
    return found


def _policies_in(module: Any) -> list[str]:
    from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier

    bases = (PrefillSparsifier, DecodeCompressor)
    return [
        name
        for name, each in vars(module).items()
        if isinstance(each, bases)
        or (inspect.isclass(each) and issubclass(each, bases) and each.__module__ == module.__name__)
    ]


def _described(kind: str, name: str, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "conforms": all(each.outcome != "failed" for each in results),
        "checks": [
            {
                "check": each.check.name,
                "says": each.check.summary,
                "outcome": str(each.outcome),
                "reason": each.reason,
            }
            for each in results
        ],
    }


def _print(kind: str, name: str, results: Sequence[Result], *, report: bool) -> None:
    counts = Counter(str(each.outcome) for each in results)
    out = console()
    if report:
        rows = [(each.check.name, each.check.summary, str(each.outcome), each.reason) for each in results]
        columns = ("check", "what it says", "result", "why")
        print_table(columns, rows, title=f"{kind} policy {name}", prose=("what it says", "why"))
    else:
        for each in results:
            if each.outcome == "failed":
                out.print(f"{each.check.name} failed: {each.reason}", markup=False, soft_wrap=True)
                out.print(f"  it says: {each.check.summary}", markup=False, soft_wrap=True)
    totals = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ok", "failed", "skipped"))
    out.print(f"{kind} policy {name}: {len(results)} checks, {totals}", markup=False)
