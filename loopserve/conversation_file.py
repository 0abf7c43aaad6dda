"""Read and write conversations as JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopserve.core.atomic_file import write_atomically
from loopserve.core.errors import ConfigError, InputError

VERSION = 1
_ROLES = ("system", "user", "assistant")


def save_messages(path: str | Path, messages: Sequence[Mapping[str, str]], stack: Mapping[str, Any]) -> None:
    """Write a conversation, with its stack for the record.

    Raises InputError if that fails; a file that was there before is whole then.
    """
    body = {"version": VERSION, "stack": stack, "messages": list(messages)}
    try:
        write_atomically(path, json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte, a text that is no UTF-8
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: cannot save the conversation ({reason}); what the file held before is unchanged"
        ) from error


def load_messages(path: str | Path) -> list[dict[str, str]]:
    """Return the messages of a file that ``save_messages`` wrote. Raises ConfigError for anything else."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or "version" not in saved:
            raise ValueError("it has no version")
        if saved["version"] != VERSION:
            raise ValueError(f"version {saved['version']}, known is {VERSION}")
        return check_messages(saved.get("messages"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a saved conversation ({error})") from error


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Return the messages of complete turns, and system messages between them. Raises ValueError that names the message."""
    if not isinstance(messages, list):
        raise ValueError("its messages are not a list")
    checked = []
    for number, message in enumerate(messages, 1):
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if role not in _ROLES:
            raise ValueError(f"message {number} has the role {role!r}, known are {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has the content {content!r}, which is no text")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"message {number} holds bytes that are no text") from error
        checked.append({"role": role, "content": content})
    roles = [message["role"] for message in checked if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("its messages are not turns of user and assistant")
    return checked
