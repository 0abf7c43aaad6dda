"""Define ``loopserve sessions``: the conversations in a session directory, while no server uses it or beside one."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopserve.cli.output import print_json, print_table, remember_json
from loopserve.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from loopserve.serve.records import StoredSession
    from loopserve.serve.store import Store

app = typer.Typer(help="Conversations in a session directory of `loopserve serve`: list, show, verify, export, remove.")


def _remember(wanted: bool) -> bool:
    remember_json(wanted)
    return wanted


DirOption = Annotated[Path, typer.Option("--session-dir", help="The directory that was given to `loopserve serve`.")]
KeyOption = Annotated[
    Path | None, typer.Option("--session-key-file", help="The key that was given to `loopserve serve`.")
]
JsonOption = Annotated[bool, typer.Option("--json", callback=_remember, help="Print JSON.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="A session, or the beginning of its id.")]


def _open(directory: Path, key: Path | None) -> Store:
    from loopserve.serve.sealing import Sealer, read_key
    from loopserve.serve.store import Store

    if not (directory / "index.sqlite").is_file():
        raise ConfigError(f"--session-dir {directory}: no sessions there; give the directory that the server was given")
    return Store(directory, Sealer(None if key is None else read_key(key)))


def _find(store: Store, name: str) -> StoredSession:
    found = [each for each in store.sessions() if each.id.startswith(name)]
    if len(found) != 1:
        raise InputError(
            f"{len(found) or 'no'} sessions have an id that begins with {name!r}; `loopserve sessions ls` lists them"
        )
    return found[0]


def _as_json(store: Store, session: StoredSession) -> dict[str, Any]:
    from loopserve.serve.records import Path as TurnPath
    from loopserve.serve.sessions import as_json

    path = store.path(session.tenant, session.head) if session.head is not None else None
    return {"tenant": session.tenant} | as_json(session, path or TurnPath())


@app.command("ls")
def list_sessions(session_dir: DirOption, session_key_file: KeyOption = None, json: JsonOption = False) -> None:
    """All sessions, latest first."""
    store = _open(session_dir, session_key_file)
    found = [_as_json(store, each) for each in store.sessions()]
    if json:
        print_json(found)
    elif not found:
        print(f"no sessions in {session_dir}")
    else:
        rows = [
            (
                each["id"][:12],
                each["tenant"][:12],
                datetime.fromtimestamp(each["updated"]).strftime("%Y-%m-%d %H:%M"),
                str(len(each["turns"])),
                str(each["tokens"]),
            )
            for each in found
        ]
        print_table(("id", "tenant", "last used", "turns", "tokens"), rows, keys=3)


@app.command()
def show(
    name: IdArgument, session_dir: DirOption, session_key_file: KeyOption = None, json: JsonOption = False
) -> None:
    """One session with its messages."""
    store = _open(session_dir, session_key_file)
    found = _as_json(store, _find(store, name))
    if json:
        print_json(found)
        return
    print(f"session {found['id']} of {found['tenant']}: {len(found['turns'])} turns, {found['tokens']} tokens")
    for turn in found["turns"]:
        for message in (*turn["messages"], turn["answer"]):
            print(f"\n{message['role']}: {message['content']}")


@app.command()
def verify(session_dir: DirOption, session_key_file: KeyOption = None, json: JsonOption = False) -> None:
    """Compare every cache file with its checksums; exit with 1 if one is damaged. A server computes such a cache again by itself."""
    from loopserve.serve.kv_files import damaged_files

    store = _open(session_dir, session_key_file)
    count, found = len(store.every_kv()) + len(store.damaged_kv()), damaged_files(store)
    if json:
        print_json({"files": count, "damaged": dict(found)})
    else:
        for file, reason in found:
            print(f"{file}: {reason}")
        print(f"{count} files, {len(found)} damaged")
    if found:
        raise typer.Exit(1)


@app.command()
def export(name: IdArgument, session_dir: DirOption, session_key_file: KeyOption = None) -> None:
    """One session as JSON, in the form that `Engine.load_session` reads."""
    store = _open(session_dir, session_key_file)
    session = _find(store, name)
    path = store.path(session.tenant, session.head) if session.head is not None else None
    messages: list[dict[str, Any]] = []
    for turn in path.turns if path is not None else ():
        messages += [dict(message) for message in turn.messages]
        messages.append({**turn.answer, "token_ids": list(turn.output_tokens)})
    print(json.dumps({"version": 1, "messages": messages}, indent=2, ensure_ascii=False))


@app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(metavar="ID...", help="Sessions, or the beginnings of their ids.")],
    session_dir: DirOption,
    session_key_file: KeyOption = None,
) -> None:
    """Delete sessions with their caches; this cannot be undone."""
    from loopserve.serve.kv_files import remove_files

    store = _open(session_dir, session_key_file)
    for session in [_find(store, each) for each in names]:
        remove_files(store, store.remove_session(session.tenant, session.id))
        print(f"deleted {session.id}")
