"""Build the output items of a response from the deltas of its answer, and the event of each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loopserve.models.logprobs import TokenLogprob
from loopserve.models.tool_calls import ToolCall
from loopserve.serve.answer import Delta
from loopserve.serve.rendering import chat_logprobs
from loopserve.serve.response_items import call_item, message_item, reasoning_item, text_part

Step = tuple[str, dict[str, Any]]  # type of an event without "response.", and its fields


class Output:
    """Collect the items of one response. Every method gives the steps that it takes, in the order of their events."""

    def __init__(self, answer: str) -> None:
        """answer: its id, which the ids of the items are made of."""
        self.items: list[dict[str, Any]] = []
        self._answer = answer
        self._open = ""  # type of the item under way
        self._text = self._space = ""  # of it: what was given, and white space that may turn out to be its end
        self._logprobs: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []  # log-probabilities of text that is held back

    def add(self, delta: Delta) -> Iterator[Step]:
        """Add what one pass gave."""
        if delta.reasoning:
            yield from self._begin("reasoning")
            self._text += delta.reasoning
            yield "reasoning_text.delta", self._place | {"delta": delta.reasoning}
        yield from self._say(delta.text, delta.logprobs)
        for call in delta.calls:
            yield from self._call(call)

    def end(self, *, complete: bool = True) -> Iterator[Step]:
        """End the response. complete: False if the limit of tokens ended it."""
        if not self.items and not self._open:
            yield from self._begin("message")
        yield from self._close("completed" if complete else "incomplete")

    def _say(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Iterator[Step]:
        """Add text. White space at both ends of a message is left out, as in the answer that is stored."""
        text = self._space + text if self._open == "message" else text.lstrip()
        kept = text.rstrip()
        if self._open == "message" or kept:
            self._pending += [each.model_dump(mode="json") for each in chat_logprobs(logprobs)]
        if not kept:
            self._space = text if self._open == "message" else ""
            return
        pending, self._pending = self._pending, []
        yield from self._begin("message")
        self._space = text[len(kept) :]
        self._text += kept
        self._logprobs += pending
        yield "output_text.delta", self._place | {"delta": kept, "logprobs": pending}

    def _call(self, call: ToolCall) -> Iterator[Step]:
        yield from self._close()
        name, place = f"fc_{self._answer}_{len(self.items)}", {"output_index": len(self.items)}
        yield "output_item.added", place | {"item": call_item(name, call, done=False)}
        yield "function_call_arguments.delta", place | {"item_id": name, "delta": call.arguments}
        yield (
            "function_call_arguments.done",
            place | {"item_id": name, "name": call.name, "arguments": call.arguments},
        )
        self.items.append(call_item(name, call))
        yield "output_item.done", place | {"item": self.items[-1]}

    @property
    def _name(self) -> str:
        return f"{'msg' if self._open == 'message' else 'rs'}_{self._answer}_{len(self.items)}"

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._name, "output_index": len(self.items), "content_index": 0}

    def _begin(self, kind: str) -> Iterator[Step]:
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        text = kind == "message"
        item = message_item(self._name, "", "in_progress") if text else reasoning_item(self._name, None)
        yield "output_item.added", {"output_index": len(self.items), "item": item}
        part = text_part("") if text else {"type": "reasoning_text", "text": ""}
        yield "content_part.added", self._place | {"part": part}

    def _close(self, status: str = "completed") -> Iterator[Step]:
        if not self._open:
            return
        if self._open == "message":
            item = message_item(self._name, self._text, status, self._logprobs)
            yield "output_text.done", self._place | {"text": self._text, "logprobs": self._logprobs}
        else:
            item = reasoning_item(self._name, self._text)
            yield "reasoning_text.done", self._place | {"text": self._text}
        yield "content_part.done", self._place | {"part": item["content"][0]}
        yield "output_item.done", {"output_index": len(self.items), "item": item}
        self.items.append(item)
        self._open = self._text = self._space = ""
        self._logprobs, self._pending = [], []
