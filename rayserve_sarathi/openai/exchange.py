"""One HTTP exchange: a body within limits, an end when the client is gone or time is over, and streams of events."""

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, NoReturn, TypeVar

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from rayserve_sarathi.openai.answers import JsonObject
from rayserve_sarathi.openai.errors import ClientGoneError, DeadlineError, HttpError
from rayserve_sarathi.openai.json_encoder import encode_json

EVENT_STREAM = "text/event-stream"
_BODY_TIMEOUT_S = 60.0
_SEND_TIMEOUT_S = 30.0
"""A client that reads nothing for this long is gone: what is generated for it would fill the memory."""
_DONE = b"data: [DONE]\n\n"

_Result = TypeVar("_Result")


@asynccontextmanager
async def time_limit(until_s: float, message: str) -> AsyncGenerator[None]:
    """Raise DeadlineError inside the block when the event loop's clock reaches `until_s`."""
    try:
        async with asyncio.timeout_at(until_s) as limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise DeadlineError(message) from None
        raise  # somebody else's time was over


def read_deadline(headers: Mapping[str, str], *, now_s: float, longest_s: float) -> float:
    """Return when a request must be answered, on the clock of `now_s`.

    Raises:
        HttpError: `x-request-timeout-seconds` is not a positive number.
    """
    given = headers.get("x-request-timeout-seconds")
    if given is None:
        return now_s + longest_s
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not timeout_s > 0:
        raise HttpError.invalid_header(f"x-request-timeout-seconds must be a positive number, got {given[:40]!r}")
    return now_s + min(timeout_s, longest_s)


async def read_json_object(
    request: Request, *, max_body_bytes: int, until_s: float = math.inf, late_message: str = ""
) -> dict[str, object]:
    """Return the body of a request, never holding more than `max_body_bytes` of it. Of equal keys the last one counts.

    Args:
        request: Whose.
        max_body_bytes: Most to read.
        until_s: When the request must be answered, on the event loop's clock.
        late_message: What to say if the body is not there by then.

    Raises:
        HttpError: It is too large, no JSON object, or of another kind.
        DeadlineError: It does not arrive.
        ClientGoneError: The client left.
    """
    _check_kind(request.headers)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_body_bytes:
        raise HttpError.request_too_large(max_body_bytes)
    body_until_s = asyncio.get_running_loop().time() + _BODY_TIMEOUT_S
    if body_until_s < until_s:
        until_s, late_message = body_until_s, f"the body did not arrive within {_BODY_TIMEOUT_S:.0f} s"
    body = bytearray()
    async with time_limit(until_s, late_message):
        try:
            async for part in request.stream():
                body += part
                if len(body) > max_body_bytes:
                    raise HttpError.request_too_large(max_body_bytes)
        except ClientDisconnect:
            raise ClientGoneError("while it sent the body") from None
    try:
        value = from_json(bytes(body))
    except ValueError as error:
        raise HttpError.invalid_json(str(error)) from None
    if not isinstance(value, dict):
        raise HttpError.not_an_object()
    return value


def _check_kind(headers: Mapping[str, str]) -> None:
    kind, _, parameters = headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise HttpError.unsupported_media_type("the body must be JSON; send it with content-type: application/json")
    for parameter in parameters.replace(" ", "").replace('"', "").lower().split(";"):
        if parameter.startswith("charset=") and parameter not in ("charset=utf-8", "charset=us-ascii"):
            raise HttpError.unsupported_media_type("the body must be in UTF-8")
    if headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise HttpError.unsupported_media_type("the body must not be compressed; leave content-encoding out")


async def until_disconnect(
    receive: Receive, work: Coroutine[Any, Any, _Result], *watches: Coroutine[Any, Any, NoReturn]
) -> _Result:
    """Do `work`, but cancel it as soon as the client closes its connection, or one of `watches` raises.

    Raises:
        ClientGoneError: The client did, or a watch says so.
    """
    working = asyncio.ensure_future(work)
    watching = [asyncio.ensure_future(watch) for watch in (_disconnect(receive), *watches)]
    try:
        done, _ = await asyncio.wait((working, *watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working in done else done.pop().result()
    finally:
        for task in (working, *watching):
            task.cancel()
        await asyncio.gather(working, *watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> NoReturn:
    with suppress(Exception):  # a server that cannot tell has lost the client too
        while (await receive())["type"] != "http.disconnect":
            pass
    raise ClientGoneError("before its answer was complete")


def encode_event(value: JsonObject) -> bytes:
    """Return a server-sent event."""
    return b"data: %b\n\n" % encode_json(value)


class EventStream(Response):
    """Sends chunks as server-sent events, each as soon as there is one.

    The status waits for the first chunk, so that an error before it is an ordinary answer.

    Args:
        chunks: Closed when the client leaves or the time is over.
        until_s: When to give up, on the event loop's clock.
        message: What to say then.
        send_timeout_s: How long the client may read nothing before it is taken for gone.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[JsonObject],
        *,
        until_s: float,
        message: str,
        send_timeout_s: float = _SEND_TIMEOUT_S,
    ) -> None:
        super().__init__(media_type=EVENT_STREAM, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._until_s = until_s
        self._message = message
        self._send_timeout_s = send_timeout_s
        self._send_begin_s = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        await until_disconnect(receive, self._send_all(send), self._watch_sends())

    async def _send_all(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time

        async def send_watched(message: Message) -> None:
            self._send_begin_s = clock()
            await send(message)
            self._send_begin_s = math.inf

        has_started = False
        async with aclosing(self._chunks) as chunks, time_limit(self._until_s, self._message):
            async for chunk in chunks:
                if not has_started:
                    has_started = True
                    status, headers = self.status_code, self.raw_headers
                    await send_watched({"type": "http.response.start", "status": status, "headers": headers})
                await send_watched({"type": "http.response.body", "body": encode_event(chunk), "more_body": True})
            await send_watched({"type": "http.response.body", "body": _DONE})

    async def _watch_sends(self) -> NoReturn:
        """Raise ClientGoneError when a send has not ended for long. A timer for each event would cost more than it."""
        clock = asyncio.get_running_loop().time
        left_s = self._send_timeout_s
        while left_s > 0:
            await asyncio.sleep(left_s)
            left_s = self._send_timeout_s + min(self._send_begin_s - clock(), 0.0)
        raise ClientGoneError(f"it has read nothing for {self._send_timeout_s:g} s")
