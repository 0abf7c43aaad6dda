"""Define ``loopserve run``: one question, one answer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from loopserve.cli.options import Format, FormatOption, ModelArgument, ModelOptions, Settings, with_model_options
from loopserve.cli.output import print_json, turn_line
from loopserve.core.errors import InputError


@with_model_options
def run(
    context: typer.Context,
    options: ModelOptions,
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The message; '-' or nothing reads it from a pipe.")] = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Answer one message and leave."""
    text = _read(prompt)
    settings: Settings = context.obj
    stack = settings.stack(options.stack)
    with options.engine(model, stack) as engine, engine.session(options.system) as conversation:
        for piece in conversation.stream(text, **options.sampling):
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
    if options.verbose or settings.verbose:
        print(turn_line(stats), file=sys.stderr)


def _read(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise InputError("no prompt: give it as the second argument, or pipe it in")
    text = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty: give some text as the second argument, or pipe it in")
    return text
