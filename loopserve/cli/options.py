"""Options that several commands share, and the one way from a command to the registry and to a stack."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from loopserve.core.errors import OnPolicyFault, PolicyChecks

if TYPE_CHECKING:
    from loopserve.core.stack.stack import PolicyStack
    from loopserve.plugins import LoadedPlugins


class Format(StrEnum):
    HUMAN = "human"
    JSON = "json"


@dataclass(frozen=True)
class Settings:
    """The global options; every command finds them in ``context.obj``."""

    verbose: bool = False
    strict_plugins: bool = False

    def plugins(self) -> LoadedPlugins:
        """The registry with all plugins; those that were skipped are named on stderr."""
        from loopserve.plugins import load_registry

        loaded = load_registry(strict=self.strict_plugins)
        for problem in loaded.problems:
            print(f"warning: {problem}", file=sys.stderr)
        return loaded

    def stack(self, spec: str) -> PolicyStack:
        """A preset's name or a file's path as a stack."""
        return self.stacks([spec])[0]

    def stacks(self, specs: Iterable[str]) -> list[PolicyStack]:
        from loopserve.core.stack.stack import resolve_stack

        registry = self.plugins().registry
        return [resolve_stack(spec, registry) for spec in specs]


FormatOption = Annotated[Format, typer.Option("--format", help="Tables and text, or one JSON object.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a local directory, or 'demo'.")]
StackOption = Annotated[str, typer.Option(help="A preset's name or a YAML file.")]
SystemOption = Annotated[str | None, typer.Option(help="System message the conversation begins with.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print per-turn statistics.")]

DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustOption = Annotated[bool, typer.Option(help="Run code that comes with the model.")]

MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 = greedy.")]
TopPOption = Annotated[float, typer.Option(max=1.0, help="Keep this probability mass.")]
TopKOption = Annotated[int, typer.Option(min=0, help="Keep this many tokens; 0 = all.")]
ChecksOption = Annotated[
    PolicyChecks, typer.Option("--policy-checks", help="cheap, or strict: every check of a policy there is; slow.")
]
FaultOption = Annotated[
    OnPolicyFault,
    typer.Option("--on-policy-fault", help="What a policy's fault does: finish the turn dense, or raise an error."),
]
TimeoutOption = Annotated[
    float, typer.Option("--policy-timeout", min=0.0, help="Seconds a call of a policy may take; 0 = any.")
]

SeedOption = Annotated[int | None, typer.Option(help="Makes a drawn answer repeatable.")]
