"""Read the tools and the form of the answer that a request of chat or responses asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loopserve.api import Engine
from loopserve.models.messages import TOOLS, Message
from loopserve.serve.errors import invalid
from loopserve.serve.structured import Grammar, Grammars

MAX_TOOLS = 512


@dataclass(frozen=True)
class Tooling:
    """Hold the functions that the model may call, in the form of chat completions, and whether it must call one."""

    functions: tuple[dict[str, Any], ...] = ()
    forced: bool = False
    parallel: bool = True
    choice: Any = field(default="auto", compare=False)

    @property
    def messages(self) -> list[Message]:
        """Return the message before all others that holds the definitions; none without functions."""
        if not self.functions:
            return []
        return [{"role": TOOLS, "content": json.dumps(self.functions, ensure_ascii=False)}]


def read_tools(tools: Sequence[Any] | None, choice: Any, parallel: bool | None) -> Tooling:
    """Return the functions among the tools of a request. Tools of other types are skipped: they run elsewhere.

    A function is given as in chat completions or, flat, as in responses. ApiError (400) names what is wrong.
    """
    if len(tools or ()) > MAX_TOOLS:
        raise invalid(f"tools: at most {MAX_TOOLS}", "tools")
    functions = [_function(each, number) for number, each in enumerate(tools or ())]
    known = {each["function"]["name"]: each for each in functions if each is not None}
    mode, names = _choice(choice)
    if mode == "none":
        return Tooling(choice=choice)
    for name in names or ():
        if name not in known:
            raise invalid(f"tool_choice: no function {name[:80]!r} is among the tools", "tool_choice")
    allowed = tuple(each for name, each in known.items() if names is None or name in names)
    if mode == "required" and not allowed:
        raise invalid("tool_choice: a call is required, but no function is among the tools", "tool_choice")
    return Tooling(allowed, mode == "required", parallel is not False, "auto" if choice is None else choice)


def _function(tool: Any, number: int) -> dict[str, Any] | None:
    where = f"tools[{number}]"
    if not isinstance(tool, Mapping) or not isinstance(tool.get("type"), str):
        raise invalid(f"{where} is an object with a type", "tools")
    if tool["type"] != "function":
        return None
    given = tool.get("function", tool)
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        raise invalid(f"{where}: a function needs a name of 1 to 256 characters", "tools")
    function: dict[str, Any] = {"name": name}
    for key, kind in (("description", str), ("parameters", Mapping)):
        value = given.get(key)
        if value is not None and not isinstance(value, kind):
            raise invalid(f"{where}: {key} is {'text' if kind is str else 'a JSON schema, an object'}", "tools")
        if value is not None:
            function[key] = value
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _choice(choice: Any) -> tuple[str, list[str] | None]:
    """Return (none, auto or required; the names that are allowed, None for all)."""
    if choice is None:
        return "auto", None
    if choice in ("none", "auto", "required"):
        return choice, None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        name = choice.get("function", choice)
        name = name.get("name") if isinstance(name, Mapping) else None
        if isinstance(name, str):
            return "required", [name]
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        if (
            isinstance(inner, Mapping)
            and isinstance(inner.get("tools"), list)
            and inner.get("mode") in ("auto", "required")
        ):
            named = [_choice(each)[1] or [] for each in inner["tools"] if isinstance(each, Mapping)]
            return str(inner["mode"]), [name for names in named for name in names]
    raise invalid(
        f"tool_choice: {str(choice)[:80]!r} is not supported; known are none, auto, required, a function, allowed_tools",
        "tool_choice",
    )


def answer_form(
    engine: Engine, grammars: Grammars, tooling: Tooling, schema: Mapping[str, Any] | None, param: str
) -> Grammar | None:
    """Return the grammar of the answer: a call if one is required, JSON if a schema is given, either if both may be.

    Blocks. ApiError (400) if the template's way to write calls is not known.
    """
    known = engine.tokenizer.tool_format
    if tooling.functions and known is None:
        raise invalid("tools: how this model's chat template writes tool calls is not known to the server", "tools")
    if tooling.forced and known is not None:
        return grammars.answer(None, known, tooling.functions, "tools")
    if schema is not None:
        return grammars.answer(schema, known, tooling.functions, param)
    return None


def schema_of(form: Any, param: str) -> Mapping[str, Any] | None:
    """Return the JSON schema that ``response_format`` or ``text.format`` asks for; None for plain text."""
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        given = form.get("json_schema", form)
        schema = given.get("schema") if isinstance(given, Mapping) else None
        if isinstance(schema, Mapping):
            return schema
        raise invalid(f"{param}: json_schema needs a schema, an object", param)
    raise invalid(f"{param}: {str(kind)[:80]!r} is not supported; known are text, json_object, json_schema", param)
