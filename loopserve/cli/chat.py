"""``loopserve chat``: talk to a model under a stack."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from loopserve.cli.options import (
    ChecksOption,
    DeviceOption,
    DtypeOption,
    FaultOption,
    MaxNewTokensOption,
    ModelArgument,
    RevisionOption,
    SeedOption,
    Settings,
    StackOption,
    SystemOption,
    TemperatureOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    TrustOption,
    VerboseOption,
)
from loopserve.core.errors import POLICY_TIMEOUT_S, OnPolicyFault, PolicyChecks


def chat(
    context: typer.Context,
    model: ModelArgument,
    stack: StackOption = "loopserve",
    system: SystemOption = None,
    resume: Annotated[
        Path | None, typer.Option("--continue", metavar="FILE", help="Go on with a conversation that /save wrote.")
    ] = None,
    verbose: VerboseOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    policy_checks: ChecksOption = PolicyChecks.CHEAP,
    on_policy_fault: FaultOption = OnPolicyFault.DENSE,
    policy_timeout: TimeoutOption = POLICY_TIMEOUT_S,
) -> None:
    """Talk to a model. Inside: /help /stats /stack /undo /retry /save /exit."""
    from loopserve.cli.repl import Repl
    from loopserve.core.stack.config import to_yaml

    settings: Settings = context.obj
    if resume is not None and system is not None:
        raise typer.BadParameter("a conversation that goes on keeps its own system message: leave --system out")
    resolved = settings.stack(stack)
    from loopserve.api import Engine

    engine = Engine.from_pretrained(
        model,
        resolved,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        policy_checks=policy_checks,
        on_policy_fault=on_policy_fault,
        policy_timeout_s=policy_timeout or None,
    )
    if _at_terminal():
        print(f"{model} under the stack {resolved.name}; /help lists the commands, /exit leaves")
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    with engine.load_session(resume) if resume else engine.session(system) as conversation:
        repl = Repl(
            conversation,
            stack=to_yaml(resolved.describe()),
            read=_reader(),
            write=lambda piece: print(piece, end="", flush=True),
            sampling=sampling,
            verbose=verbose or settings.verbose,
        )
        raise typer.Exit(repl.run())


def _at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _reader() -> Callable[[], str]:
    """Prompts and line editing at a terminal; bare lines from a pipe."""
    if not _at_terminal():
        return lambda: input()
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  # its import alone gives input() history and editing
    return lambda: input("> ")
