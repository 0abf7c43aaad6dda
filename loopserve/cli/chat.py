"""Define ``loopserve chat``, a conversation at the terminal, and ``loopserve run``: one question, one answer."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopserve.cli.chat_log import ChatLog, LoggedConversation, Recorder, TurnState
from loopserve.cli.options import Format, FormatOption, ModelArgument, ModelOptions, Settings, with_model_options
from loopserve.cli.output import print_json, turn_line
from loopserve.cli.repl import ReadingProgress, at_terminal, reader
from loopserve.core.errors import InputError

if TYPE_CHECKING:
    from loopserve.api import Engine
    from loopserve.chat_session import ChatSession


_OF_AN_ENGINE = (
    "stack",
    "dtype",
    "device",
    "weights",
    "break_even",
    "revision",
    "trust_remote_code",
    "policy_checks",
    "on_policy_fault",
    "policy_timeout",
)
_HINT = (
    "the bundled model knows only what you give it; try: the code of lisbon is amber falcon river . "
    "what is the code of lisbon ?"
)


@with_model_options
def chat(
    context: typer.Context,
    options: ModelOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A hub id, a directory, a .gguf file, 'smollm2' or 'demo'; with --continue, that of the conversation.",
        ),
    ] = None,
    last: Annotated[
        bool, typer.Option("--continue", "-c", help="Go on with the last conversation of the log.")
    ] = False,
    number: Annotated[
        int | None, typer.Option("--id", metavar="N", help="Go on with conversation N of the log, see loopserve logs.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option("--load", metavar="FILE", help="Go on with a conversation that /save wrote.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Talk to an OpenAI-compatible server instead; MODEL is then one that it serves."
        ),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of that server.")] = None,
    log: Annotated[
        bool, typer.Option("--log/--no-log", envvar="LOOPSERVE_LOG", help="Log the conversation as it goes.")
    ] = True,
) -> None:
    """Talk to a model. Inside, /help lists the commands; the conversation is logged, see `loopserve logs`."""
    from loopserve.cli.repl import Repl
    from loopserve.core.stack.config import to_yaml

    settings: Settings = context.obj
    if sum((last, number is not None, load is not None)) > 1:
        raise typer.BadParameter("--continue, --id and --load name different conversations: give one of them")
    if url is not None:
        if last or number is not None or load is not None:
            raise typer.BadParameter("--url begins a new conversation: leave --continue, --id and --load out")
        _refuse_options_of_an_engine(context, log=log)
        raise typer.Exit(_remote(url, model, api_key, options, verbose=options.verbose or settings.verbose))
    goes_on = last or number is not None
    if options.system is not None and (goes_on or load is not None):
        raise typer.BadParameter("a conversation that goes on keeps its own system message: leave --system out")
    chats = ChatLog()
    held = (chats.last() if number is None else chats.conversation(number)) if goes_on else None
    if model is None and held is None:
        raise typer.BadParameter("no model: give a hub id, a directory, a .gguf file, 'smollm2' or 'demo'")
    conversation = _conversation(context, options, model, held)
    stack = settings.stack(conversation.stack)
    with (
        options.engine(conversation.model, stack, revision=conversation.revision) as engine,
        _session(engine, conversation, load) as session,
    ):
        person = at_terminal()
        if person:
            _greet(conversation, stack.name, going_on=held is not None or load is not None)
        recorder = Recorder(chats if log else None, conversation, _warn)
        progress = ReadingProgress() if person and sys.stderr.isatty() else None
        repl = Repl(
            session,
            stack=to_yaml(stack.describe()),
            read=reader(),
            write=lambda piece: print(piece, end="", flush=True),
            sampling=options.sampling,
            verbose=options.verbose or settings.verbose,
            interactive=person,
            warn=None if person else lambda line: print(line, end="", file=sys.stderr, flush=True),
            recorder=recorder,
            progress=progress,
            answering=progress.clear if progress else lambda: None,
        )
        code = repl.run()
        if person and (farewell := recorder.farewell()):
            print(farewell)
        raise typer.Exit(code)


def _refuse_options_of_an_engine(context: typer.Context, *, log: bool) -> None:
    """Raise BadParameter for options that were given beside --url and that only a model in this process could follow."""
    names = [name for name in _OF_AN_ENGINE if _is_given(context, name)]
    if log and _is_given(context, "log"):
        names.append("log")
    if names:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise typer.BadParameter(f"{given}: the model of --url is the server's, and so is its log; leave it out")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _remote(url: str, model: str | None, api_key: str | None, options: ModelOptions, *, verbose: bool) -> int:
    """Talk to a server; return the exit code. The server keeps the conversation, so that it is not logged here."""
    from loopserve.cli.remote import RemoteConversation
    from loopserve.cli.repl import Repl

    conversation, person = RemoteConversation(url, model, api_key=api_key, system=options.system), at_terminal()
    if person:
        print(f"{conversation.model} at {url}; /help lists the commands, /exit leaves")
    repl = Repl(
        conversation,
        stack="the policies are the server's",
        read=reader(),
        write=lambda piece: print(piece, end="", flush=True),
        sampling=options.sampling,
        verbose=verbose,
        interactive=person,
        warn=None if person else lambda line: print(line, end="", file=sys.stderr, flush=True),
    )
    return repl.run()


def _conversation(
    context: typer.Context, options: ModelOptions, model: str | None, held: LoggedConversation | None
) -> LoggedConversation:
    """Return a new conversation, or a logged one with its model and stack unless others are given."""
    new = LoggedConversation(_absolute(model or ""), _absolute(options.stack), options.system, options.revision)
    if held is None:
        return new
    if model is not None:
        held.model, held.revision = new.model, new.revision
    elif options.revision is not None:
        held.revision = options.revision
    source = context.get_parameter_source("stack")
    if source is not None and source.name != "DEFAULT":
        held.stack = new.stack
    return held


def _session(engine: Engine, conversation: LoggedConversation, load: Path | None) -> ChatSession:
    """Open the session of a new or continued conversation."""
    if load is not None:
        session = engine.load_session(load)
        conversation.take_over(session.messages)
        return session
    return engine.session(messages=conversation.messages) if conversation.turns else engine.session(conversation.system)


def _absolute(spec: str) -> str:
    """Return the absolute path of a directory or file. Names stay unchanged."""
    with suppress(OSError):
        if spec and ("/" in spec or spec.endswith((".yaml", ".yml"))) and Path(spec).expanduser().exists():
            return str(Path(spec).expanduser().absolute())
    return spec


def _greet(conversation: LoggedConversation, stack: str, *, going_on: bool) -> None:
    from loopserve.models.demo import is_bundled

    print(f"{conversation.model} under the stack {stack}; /help lists the commands, /exit leaves")
    if going_on:
        turns = len([turn for turn in conversation.turns if turn.state is TurnState.ANSWERED])
        print(f"going on after {turns} turn{'' if turns == 1 else 's'}; /undo and /retry reach back into them")
        if conversation.unanswered is not None:
            print("the last message got no answer: /retry sends it again")
    elif is_bundled(conversation.model):
        print(_HINT)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


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
