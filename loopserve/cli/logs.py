"""Define ``loopserve logs``: the conversations that ``loopserve chat`` has logged."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer

from loopserve.cli.chat_log import ChatLog, LoggedConversation, TurnState, default_path
from loopserve.cli.output import print_json, print_table, remember_json

app = typer.Typer(
    help="Conversations that were logged: list, show, search and remove them. Alone, it lists the latest ones.",
    invoke_without_command=True,
)


def _remember(wanted: bool) -> bool:
    remember_json(wanted)
    return wanted


JsonOption = Annotated[bool, typer.Option("--json", callback=_remember, help="Print JSON.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=0, help="Show this many, the latest first; 0 = all.")]
IdArgument = Annotated[int, typer.Argument(metavar="ID", help="The number of a conversation.")]


@app.callback()
def latest(context: typer.Context, json: JsonOption = False, limit: LimitOption = 20) -> None:
    if context.invoked_subcommand is None:
        _print(ChatLog().conversations(limit=limit or None), json)


@app.command("list")
def list_conversations(json: JsonOption = False, limit: LimitOption = 20) -> None:
    """The latest conversations."""
    _print(ChatLog().conversations(limit=limit or None), json)


@app.command()
def show(number: IdArgument, json: JsonOption = False) -> None:
    """One conversation, with what was taken back or stopped."""
    conversation = ChatLog().conversation(number)
    if json:
        print_json(conversation.as_dict())
        return
    print(
        f"conversation {conversation.id}: {conversation.model} under the stack {conversation.stack}, {_when(conversation.started)}"
    )
    if conversation.system is not None:
        print(f"\nsystem: {conversation.system}")
    for turn in conversation.turns:
        state = "" if turn.state is TurnState.ANSWERED else f" [{turn.state}]"
        print(f"\n> {turn.message.replace(chr(10), chr(10) + '  ')}{state}")
        if turn.answer:
            print(turn.answer)


@app.command()
def search(
    word: Annotated[
        str, typer.Argument(metavar="WORD", help="Text in a message or an answer, in any case of letters.")
    ],
    json: JsonOption = False,
    limit: LimitOption = 20,
) -> None:
    """Conversations that hold a word."""
    _print(ChatLog().conversations(word=word, limit=limit or None), json)


@app.command()
def path() -> None:
    """Where the log is."""
    print(default_path())


@app.command("rm")
def remove(
    numbers: Annotated[list[int], typer.Argument(metavar="ID...", help="The numbers of conversations.")],
) -> None:
    """Delete conversations; this cannot be undone."""
    ChatLog().remove(numbers)
    print(f"deleted {len(set(numbers))} conversation{'' if len(set(numbers)) == 1 else 's'}")


def _print(conversations: list[LoggedConversation], json: bool) -> None:
    if json:
        print_json([each.as_dict() for each in conversations])
        return
    if not conversations:
        print(f"no conversations in {default_path()}")
        return
    rows = []
    for each in conversations:
        answered = len([turn for turn in each.turns if turn.state is TurnState.ANSWERED])
        begins = " ".join(each.turns[0].message.split()) if each.turns else ""
        short = begins if len(begins) <= 60 else f"{begins[:57]}..."
        rows.append((str(each.id), _when(each.updated), each.model, str(answered), short))
    print_table(("id", "last written", "model", "turns", "begins with"), rows, keys=2, prose=("begins with", "model"))


def _when(moment: str) -> str:
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M") if moment else "-"
