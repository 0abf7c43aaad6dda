"""Put tools and instructions at the head of what a request goes on from: they are those of the request, whatever came before had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopserve.models.messages import TOOLS, Message
from loopserve.serve.errors import not_found
from loopserve.serve.matching import canonical
from loopserve.serve.records import Path
from loopserve.serve.response_items import messages_of
from loopserve.serve.server import Server

INSTRUCTIONS = "instructions"  # origin of a message that came from the field of that name


async def continued(
    server: Server,
    tenant: str,
    who: dict[str, Any],
    tools: Sequence[Message],
    messages: Sequence[Message],
    instructions: str | None = None,
    *,
    replace_instructions: bool = False,
) -> tuple[list[Message], dict[str, Any]]:
    """Return the messages and the identity of an ``Ask`` whose new messages follow a turn or the head of a session.

    who: keywords of ``Ask``, see ``identity``. If the turns before began with the same tools and instructions, they go on as they
    are; else their messages are given anew after the new head. replace_instructions: False leaves those of the turns before.
    Raises ApiError (404) for a turn or session that is not known.
    """
    head = list(tools)
    if instructions:
        head.append({"role": "system", "content": instructions, "origin": INSTRUCTIONS})
    path, initial = await server.conversations.on_disk(lambda: _before(server, tenant, who))
    if path is None:
        return [*head, *initial, *messages], who
    held = [each for each in path.messages[:2] if _is_head(each, replace_instructions)]
    if list(map(canonical, held)) == list(map(canonical, head)):
        return list(messages), who | {"previous": path.ids[-1]}
    rest = [each for number, each in enumerate(path.messages) if number > 1 or not _is_head(each, replace_instructions)]
    return [*head, *rest, *messages], who | {"previous": None}


def _is_head(message: Message, instructions: bool) -> bool:
    return message["role"] == TOOLS or (instructions and message.get("origin") == INSTRUCTIONS)


def _before(server: Server, tenant: str, who: dict[str, Any]) -> tuple[Path | None, list[Message]]:
    """Return the turns before a request, None for none, and the messages that its conversation began with."""
    store, turn = server.conversations.store, who["previous"]
    initial: list[Message] = []
    if turn is None and who["session"] is not None:
        session = store.session(tenant, who["session"])
        if session is None:
            raise not_found("conversation", who["session"], "conversation_not_found")
        turn = session.head
        initial = messages_of((store.object(tenant, session.id) or {}).get("items", []))
    if turn is None:
        return None, initial
    path = store.path(tenant, turn)
    if path is None or (store.object(tenant, turn) or {}).get("deleted"):
        raise not_found("previous response", turn, "previous_response_not_found")
    return path, initial
