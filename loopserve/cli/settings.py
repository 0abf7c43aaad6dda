"""List and change the sampling options of a chat, and vary them for another answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loopserve.core.errors import InputError, did_you_mean

OTHER_TEMPERATURE = 0.7  # for another answer, if decoding is greedy
_RESET = ("default", "reset")


def set_sampling(sampling: Mapping[str, Any], name: str, value: str | None = None) -> dict[str, Any]:
    """Return the options with one of them changed. The value ``default`` resets it, no value leaves it unchanged.

    Raises InputError for an unknown name or an invalid value.
    """
    from pydantic import ValidationError

    from loopserve.core.engine.sampling import SamplingConfig

    name = name.replace("-", "_")
    if name not in SamplingConfig.model_fields:
        raise InputError(f"no option {name!r}{did_you_mean(name, SamplingConfig.model_fields)}")
    if value is None:
        return dict(sampling)
    if value in _RESET:
        return {key: each for key, each in sampling.items() if key != name}
    changed = {**sampling, name: _parsed(value)}
    try:
        SamplingConfig(**changed)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{name}: {first['msg']} (got {value})") from error
    return changed


def describe_sampling(sampling: Mapping[str, Any], name: str | None = None) -> str:
    """Return the options and their values, one a line, or the value of one option."""
    from loopserve.core.engine.sampling import SamplingConfig

    lines = []
    for each, option in SamplingConfig.model_fields.items():
        if name in (None, each, each.replace("_", "-")):
            value = sampling.get(each, option.get_default(call_default_factory=True))
            lines.append(f"{each} = {'none' if value is None else value}  {option.description or ''}".rstrip())
    return "\n".join(lines)


def other_sampling(sampling: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return options that give another answer to the same message, and a description of the change.

    Greedy decoding and a fixed seed would repeat the answer.
    """
    other, changed = dict(sampling), []
    if not other.get("temperature"):
        other["temperature"] = OTHER_TEMPERATURE
        changed.append(f"temperature {OTHER_TEMPERATURE}")
    if other.get("top_k") == 1:
        del other["top_k"]
        changed.append("no top_k")
    if other.get("seed") is not None:
        del other["seed"]
        changed.append("no seed")
    return other, ", ".join(changed)


def _parsed(value: str) -> Any:
    if value.lower() in ("none", "null"):
        return None
    try:
        return json.loads(value)
    except ValueError:
        return value
