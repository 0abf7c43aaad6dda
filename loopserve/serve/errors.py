"""Turn exceptions into the error objects of the OpenAI API."""

from __future__ import annotations

import json
import logging
import sqlite3
from typing import Any

from loopserve.core.errors import CapacityError, ConfigError, InputError, LoopServeError, ModelError
from loopserve.serve.schema import refused

_log = logging.getLogger("loopserve.serve")
RETRY_AFTER_S = 1


class ApiError(Exception):
    """Report a request that is not answered: HTTP status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON body of the response."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    @property
    def text(self) -> str:
        """Return the body as JSON text."""
        return json.dumps(self.body)


class EngineFailure(LoopServeError):
    """Report a turn that ended with an error of the engine, not of the request. It was taken back whole."""

    def __init__(self) -> None:
        super().__init__("the engine failed and was restarted; the turn is taken back: send the request again")


def unexpected(error: BaseException) -> bool:
    """Return whether an error of a turn is one that nobody raises on purpose."""
    return not isinstance(error, LoopServeError | ApiError)


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that is wrong (400)."""
    return ApiError(400, message, param=param, code=code)


def not_found(what: str, name: str, code: str) -> ApiError:
    """Return the error for an object that does not exist for this tenant (404)."""
    return ApiError(404, f"{what} {name[:80]!r} is not known", code=code)


def overloaded(message: str) -> ApiError:
    """Return the error for a server that cannot take another request now (503 with Retry-After)."""
    return ApiError(503, message, code="server_overloaded", headers={"Retry-After": str(RETRY_AFTER_S)})


def too_many(message: str) -> ApiError:
    """Return the error for a key that asks for more than its share (429 with Retry-After)."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(RETRY_AFTER_S)})


def stopping() -> ApiError:
    """Return the error for a server that ends (503 with Retry-After)."""
    return ApiError(503, "the server is stopping", code="server_stopping", headers={"Retry-After": "5"})


def as_api_error(error: BaseException) -> ApiError:
    """Return what to answer for any exception. What nobody expected is logged; its text is not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CapacityError):
        return overloaded(str(error))
    if isinstance(error, sqlite3.DatabaseError) and refused(error):
        _log.error("the session directory cannot be used (%s)", error)
        again = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(503, "the session directory cannot be used now", code="storage_unavailable", headers=again)
    if isinstance(error, EngineFailure):
        again = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(503, str(error), code="engine_restarted", headers=again)
    if isinstance(error, InputError):
        text = str(error)
        too_long = "tokens long, the model takes" in text or "does not fit: " in text
        return invalid(text, code="context_length_exceeded" if too_long else None)
    if isinstance(error, ConfigError):
        return invalid(str(error))
    if isinstance(error, ModelError) and "chat template refuses" in str(error):
        return invalid(str(error), "messages")
    if isinstance(error, LoopServeError):
        _log.warning("a turn failed: %s", error)
        return ApiError(500, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "an internal error; the log of the server has the details")
