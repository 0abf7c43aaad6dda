"""``loopserve run``: one question, one answer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from loopserve.cli.options import (
    ChecksOption,
    DeviceOption,
    DtypeOption,
    FaultOption,
    Format,
    FormatOption,
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
from loopserve.cli.output import print_json, turn_line
from loopserve.core.errors import POLICY_TIMEOUT_S, InputError, OnPolicyFault, PolicyChecks


def run(
    context: typer.Context,
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The message; '-' or nothing reads it from a pipe.")] = None,
    stack: StackOption = "loopserve",
    system: SystemOption = None,
    format: FormatOption = Format.HUMAN,
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
    """Answer one message and leave."""
    text = _read(prompt)
    settings: Settings = context.obj
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
    with engine.session(system) as conversation:
        pieces = conversation.stream(
            text, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        for piece in pieces:
            if format is Format.HUMAN:
                print(piece, end="", flush=True)
        reply = conversation.last_reply
    assert reply is not None
    stats = reply.stats.as_dict()
    if format is Format.JSON:
        print_json(
            {
                "text": reply.text,
                "token_ids": list(reply.token_ids),
                "usage": asdict(reply.usage),
                "timings": asdict(reply.timings),
                "stats": stats,
            }
        )
        return
    print()
    if verbose or settings.verbose:
        print(turn_line(stats), file=sys.stderr)


def _read(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise InputError("no prompt: give it as the second argument, or pipe it in")
    text = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty: give some text as the second argument, or pipe it in")
    return text
