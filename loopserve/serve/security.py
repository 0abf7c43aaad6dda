"""Let only those in who hold a key. Plain ASGI, so that disconnects reach the handlers."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from loopserve.core.errors import CapacityError
from loopserve.serve.errors import ApiError, as_api_error
from loopserve.serve.settings import LOOPBACK, ServerSettings

ANONYMOUS = "anonymous"
_GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})  # by POST


def tenant_of(key: str | None) -> str:
    """Return the tenant that a key stands for; nothing of the key can be read from it."""
    return ANONYMOUS if key is None else hashlib.sha256(b"loopserve tenant\n" + key.encode()).hexdigest()[:32]


class Security:
    """Answer 401 on every path but the public ones without a valid key; set ``scope["tenant"]`` for the handlers.

    Without keys, only requests whose Host header names this machine are answered, so that a page of another origin whose name was
    pointed at this machine (DNS rebinding) reads nothing.

    A request for an answer that would not be let in now is refused here, before anything else is done for it: under overload most
    requests are such ones.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        public: Iterable[str] = ("/", "/health", "/ready"),
        check_space: Callable[[str], None] = lambda tenant: None,
    ) -> None:
        """public: exact paths that need no key. check_space: raises ApiError or CapacityError if no answer to
        a tenant would be let in now.
        """
        self._app, self._public, self._check_space = app, frozenset(public), check_space
        self._keys = [key.encode() for key in settings.api_keys]
        names = {*LOOPBACK, "[::1]", settings.host, *map(str.lower, settings.allowed_hosts)}
        self._hosts = None if settings.api_keys or settings.insecure else names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            scope["tenant"] = self.tenant(Headers(scope=scope), scope["path"])
            if scope["path"] in _GENERATING and scope.get("method") == "POST":
                self._check_space(scope["tenant"])
        except (ApiError, CapacityError) as raised:
            error = as_api_error(raised)
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def tenant(self, headers: Headers, path: str) -> str:
        """Return the tenant that a request comes from. Raises ApiError (401, 403) if it is not to be answered."""
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403,
                "this server answers requests to this machine only: give it --allowed-host or an --api-key to serve other names",
            )
        if not self._keys:
            return ANONYMOUS
        scheme, _, given = headers.get("authorization", "").partition(" ")
        valid = [key for key in self._keys if hmac.compare_digest(key, given.strip().encode())]
        if scheme.lower() == "bearer" and valid:
            return tenant_of(valid[0].decode())
        if path in self._public:
            return ANONYMOUS
        raise ApiError(
            401,
            "a valid API key is needed, as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _host(header: str) -> str:
    """Return the name of a Host header without its port."""
    if header.startswith("["):
        name, _, port = header.partition("]")
        return name + "]" + port.partition(":")[0]
    return header.partition(":")[0].lower()
