"""Define options that several commands share, and make the registry and the stack of a command."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from loopserve.cli.output import remember_json
from loopserve.core.errors import POLICY_TIMEOUT_S, OnPolicyFault, PolicyChecks

if TYPE_CHECKING:
    from loopserve.api import Engine
    from loopserve.core.stack.stack import PolicyStack
    from loopserve.plugins import LoadedPlugins


class Format(StrEnum):
    HUMAN = "human"
    JSON = "json"


class Weights(StrEnum):
    AUTO = "auto"
    INT8 = "int8"
    INT4 = "int4"


class BreakEvenFrom(StrEnum):
    AUTO = "auto"
    OFF = "off"


@dataclass(frozen=True)
class Settings:
    """Hold the global options. Every command finds them in ``context.obj``."""

    verbose: bool = False
    strict_plugins: bool = False

    def plugins(self) -> LoadedPlugins:
        """Return the registry with all plugins. Plugins that were skipped are named on stderr."""
        from loopserve.plugins import load_registry

        loaded = load_registry(strict=self.strict_plugins)
        for problem in loaded.problems:
            print(f"warning: {problem}", file=sys.stderr)
        return loaded

    def stack(self, spec: str) -> PolicyStack:
        """Return the stack of a preset's name or a file's path."""
        return self.stacks([spec])[0]

    def stacks(self, specs: Iterable[str]) -> list[PolicyStack]:
        from loopserve.core.stack.stack import resolve_stack

        registry = self.plugins().registry
        return [resolve_stack(spec, registry) for spec in specs]


def _remember(format: Format) -> Format:
    remember_json(format is Format.JSON)
    return format


FormatOption = Annotated[
    Format, typer.Option("--format", callback=_remember, help="Tables and text, or one JSON object.")
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a directory, a .gguf file, 'smollm2' or 'demo'.")
]
StackOption = Annotated[str, typer.Option(help="A preset's name or a YAML file.")]
SystemOption = Annotated[str | None, typer.Option(help="System message the conversation begins with.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print per-turn statistics.")]

BreakEvenOption = Annotated[
    BreakEvenFrom,
    typer.Option(
        "--break-even",
        envvar="LOOPSERVE_BREAK_EVEN",
        help="auto: stay dense below the lengths that `loopserve calibrate` found; off.",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
WeightsOption = Annotated[Weights, typer.Option(help="auto: as they are; int8 and int4 are faster on a CPU.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
TrustOption = Annotated[bool, typer.Option(help="Run code that comes with the model.")]

MaxNewTokensOption = Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens. [default: 256]")]
TemperatureOption = Annotated[float | None, typer.Option(min=0.0, help="0 = greedy. [default: 0]")]
TopPOption = Annotated[float | None, typer.Option(max=1.0, help="Keep this probability mass. [default: 1]")]
TopKOption = Annotated[int | None, typer.Option(min=0, help="Keep this many tokens; 0 = all. [default: 0]")]
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


@dataclass(frozen=True)
class ModelOptions:
    """Hold the options of every command in which a model answers. ``with_model_options`` adds each field as an option."""

    stack: StackOption = "loopserve"
    system: SystemOption = None
    verbose: VerboseOption = False
    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"
    weights: WeightsOption = Weights.AUTO
    revision: RevisionOption = None
    trust_remote_code: TrustOption = False
    max_new_tokens: MaxNewTokensOption = None
    temperature: TemperatureOption = None
    top_p: TopPOption = None
    top_k: TopKOption = None
    seed: SeedOption = None
    policy_checks: ChecksOption = PolicyChecks.CHEAP
    on_policy_fault: FaultOption = OnPolicyFault.DENSE
    policy_timeout: TimeoutOption = POLICY_TIMEOUT_S
    break_even: BreakEvenOption = BreakEvenFrom.AUTO

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the sampling options that were given. The engine adds the defaults of the others."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @contextmanager
    def engine(self, model: str, stack: PolicyStack, revision: str | None = None) -> Iterator[Engine]:
        """Load a model. Inside the block the libraries below show no warnings and no progress bars."""
        from loopserve.api import Engine
        from loopserve.models.quiet import quiet_libraries

        with quiet_libraries():
            yield Engine.from_pretrained(
                model,
                stack,
                dtype=self.dtype,
                device=self.device,
                weights=self.weights.value,
                revision=revision or self.revision,
                trust_remote_code=self.trust_remote_code,
                policy_checks=self.policy_checks,
                on_policy_fault=self.on_policy_fault,
                policy_timeout_s=self.policy_timeout or None,
                break_even=self.break_even.value,
            )


def with_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose parameter ``options`` (ModelOptions) is built from one option per field."""
    hints = get_type_hints(ModelOptions, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if parameter.name != "options":
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        for each in fields(ModelOptions):
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(each.name, kind, default=default, annotation=hints[each.name]))
    own = {each.name for each in fields(ModelOptions)}

    def spread(**values: Any) -> None:
        options = ModelOptions(**{name: value for name, value in values.items() if name in own})
        command(options=options, **{name: value for name, value in values.items() if name not in own})

    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__annotations__ = {each.name: each.annotation for each in parameters}
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    return spread
