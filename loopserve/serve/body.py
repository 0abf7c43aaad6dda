"""Read the JSON body of a request within its bounds, and check it against a model."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from loopserve.serve.errors import ApiError, invalid

MAX_DEPTH = 64
MAX_DIGITS = 40  # of a number; none that a field allows is longer
_DISCARDED_BYTES, _DISCARDING_S = 64 << 20, 5.0  # of a body that is too long
_BRACKETS = re.compile(r"[\[\]{}]")
T = TypeVar("T", bound=BaseModel)


async def read_body(request: Request, model: type[T], max_bytes: int, *, empty: bool = False) -> T:
    """Return the request that a body holds. Raises ApiError: 413 for too many bytes, 400 for anything that ``model`` refuses.

    empty: no body at all stands for an empty object.
    """
    data = await read_bytes(request, max_bytes)
    return model() if empty and not data else parse_body(data, model)


def parse_body(data: bytes, model: type[T]) -> T:
    """Return the request that bytes hold. Raises ApiError (400) for anything that ``model`` refuses."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8") from None
    if _too_deep(text):
        raise invalid(f"the body is nested deeper than {MAX_DEPTH} levels")
    try:
        given = json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is no valid JSON: {error}") from None
    if "\\ud" in text.lower() and not _writable(given):
        raise invalid("the body holds half of a surrogate pair, which is no text; send it as UTF-8")
    if not isinstance(given, dict):
        raise invalid("the body must be a JSON object")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _as_invalid(error) from None


def _writable(given: Any) -> bool:
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """Return the body of a request. Raises ApiError: 415 if it says that it is no JSON, 413 for too many bytes."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"the body must be application/json, not {kind[:80]!r}")
    stated = request.headers.get("content-length", "")
    data, too_long = bytearray(), stated.isdigit() and int(stated) > max_bytes
    chunks = request.stream()
    if not too_long:
        async for chunk in chunks:
            data += chunk
            if len(data) > max_bytes:
                too_long = True
                break
    if too_long:
        await _discard(chunks)
        raise _too_long(max_bytes)
    return bytes(data)


async def _discard(chunks: AsyncIterator[bytes]) -> None:
    """Read on for a while: a connection that is closed while its client still sends loses the answer on the way."""
    left = _DISCARDED_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDING_S):
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    return


def _too_long(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the body is longer than {max_bytes} bytes", code="request_too_large", headers={"Connection": "close"}
    )


def _too_deep(text: str) -> bool:
    """Return whether brackets outside strings are nested deeper than ``MAX_DEPTH``."""
    depth = 0
    for number, part in enumerate(text.replace("\\\\", "").replace('\\"', "").split('"')):
        if number % 2:
            continue
        for character in _BRACKETS.findall(part):
            depth += 1 if character in "[{" else -1
            if depth > MAX_DEPTH:
                return True
    return False


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _as_invalid(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))[:200]
    message = first["msg"].removeprefix("Value error, ")
    param = place.split(".")[0] or None
    return invalid(f"{place}: {message}" if place else message, param)
