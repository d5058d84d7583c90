"""What surrounds every route: request ids, errors, API keys."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import uuid
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayserve_sarathi.openai.errors import ClientGoneError, ErrorAnswer, HttpError, describe
from rayserve_sarathi.openai.exchange import EVENT_STREAM, encode_event

logger = logging.getLogger(__name__)

_MAX_REQUEST_ID_CHARS = 128
_GOODBYE_S = 5.0
"""How long a client that reads slowly may take for the error at the end of its stream."""


class ErrorMiddleware:
    """Gives every answer its `x-request-id`, and turns every exception into an answer or the last event of a stream.

    The id is the client's own, if it is short and printable, and is used for nothing but headers and logs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(choose_request_id(Headers(scope=scope).get("x-request-id")), send)
        try:
            await self._app(scope, receive, exchange.send)
        # The outermost frame of a request: nothing above it could answer the client.
        except Exception as error:
            answer = describe(error)
            _log(error, answer, exchange.request_id)
            if not exchange.has_started:
                await answer.to_response()(scope, receive, exchange.send)
            elif not exchange.is_event_stream:
                raise
            elif not isinstance(error, ClientGoneError):
                with contextlib.suppress(TimeoutError):  # it does not read its last event either
                    async with asyncio.timeout(_GOODBYE_S):
                        await send({"type": "http.response.body", "body": encode_event(answer.body)})


class _Exchange:
    """Watches what is sent."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.request_id = request_id
        self.has_started = False
        self.is_event_stream = False
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            self.is_event_stream = headers.get("content-type", "").startswith(EVENT_STREAM)
        await self._send(message)


def choose_request_id(given: str | None) -> str:
    """Return the client's id if it is fit to be shown and logged, else a new one."""
    if given and len(given) <= _MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable() and " " not in given:
        return given
    return uuid.uuid4().hex


def _log(error: Exception, answer: ErrorAnswer, request_id: str) -> None:
    if answer.code == "internal_error":
        logger.error("request %s: unexpected error", request_id, exc_info=error)
    elif answer.status >= 500:
        logger.error("request %s: %s", request_id, error)
    else:
        logger.info("request %s: %d %s", request_id, answer.status, answer.code)


class _Owner(NamedTuple):
    tenant: str
    is_admin: bool


class ApiKeyMiddleware:
    """Lets nobody without a key past, but to the health checks, and says in the request's state who it is.

    With several keys, each is a tenant of its own, whose cached prefixes the others cannot time.

    Args:
        app: What it guards.
        api_keys: None lets everybody past.
        admin_keys: They open all that the others do; a route may ask for one by `state.is_admin`.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], admin_keys: Sequence[str] = ()) -> None:
        self._app = app
        self._is_open = not api_keys
        has_tenants = bool(api_keys) and len(api_keys) + len(admin_keys) > 1
        self._keys = [
            (key.encode(), _Owner(_tenant(key) if has_tenants else "", is_admin))
            for keys, is_admin in ((api_keys, False), (admin_keys, True))
            for key in keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one exchange."""
        if scope["type"] == "http" and self._keys and not _is_health_check(scope):
            owner = self._find_owner(Headers(scope=scope).getlist("authorization"))
            if owner is not None:
                scope.setdefault("state", {}).update(owner._asdict())
            elif not self._is_open:
                raise HttpError.invalid_api_key()
        await self._app(scope, receive, send)

    def _find_owner(self, authorizations: Iterable[str]) -> _Owner | None:
        """Return whose key was shown; None for nobody's. Takes as long whichever key it is."""
        found: _Owner | None = None
        for authorization in authorizations:
            scheme, _, shown = authorization.partition(" ")
            for key, owner in self._keys:
                # Headers are Latin-1 on the wire, keys UTF-8 in the settings.
                is_equal = hmac.compare_digest(shown.strip().encode("latin-1"), key)
                if is_equal and scheme.lower() == "bearer":
                    found = owner
        return found


def _tenant(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def _is_health_check(scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path == "/health" or path.startswith("/health/")
