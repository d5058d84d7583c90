"""One request to an ASGI application, message by message: unlike a client, it can send slowly and leave early."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message

from tests.openai.scripted_engine import TIMEOUT_S


class AsgiCall:
    """Use as `async with`; the client stays until `leave`, or until the end of the block."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        body: object = None,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        parts: Iterable[bytes] | None = None,
        is_slow: bool = False,
    ) -> None:
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", **(headers or {})}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self._app = app
        self._parts = list(parts) if parts is not None else [encoded]
        self.num_parts_read = 0
        self._has_left = asyncio.Event()
        self._sent = asyncio.Condition()
        self._reader_waits = is_slow
        self.messages: list[Message] = []

    async def __aenter__(self) -> "AsgiCall":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self.num_parts_read < len(self._parts):
            part = self._parts[self.num_parts_read]
            self.num_parts_read += 1
            return {"type": "http.request", "body": part, "more_body": self.num_parts_read < len(self._parts)}
        await self._has_left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        async with self._sent:
            self.messages.append(message)
            self._sent.notify_all()
        if self._reader_waits and len(self.messages) > 1:
            await self._has_left.wait()

    def leave(self) -> None:
        """Close the connection from the client's side."""
        self._has_left.set()

    async def wait_for_messages(self, number: int) -> None:
        """Wait until the application has sent so many."""
        async with asyncio.timeout(TIMEOUT_S), self._sent:
            await self._sent.wait_for(lambda: len(self.messages) >= number)

    async def finish(self) -> "AsgiCall":
        """Wait for the application's end."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._task
        return self

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON of each server-sent event, `[DONE]` as a string."""
        data = [event.removeprefix("data: ") for event in self.body.decode().split("\n\n") if event]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


async def call(app: ASGIApp, path: str, body: object = None, **options: Any) -> AsgiCall:
    """Make a request and wait for the end of its answer."""
    async with AsgiCall(app, path, body, **options) as made:
        return await made.finish()


async def get(app: ASGIApp, path: str, **options: Any) -> AsgiCall:
    """GET a path."""
    return await call(app, path, b"", method="GET", **options)
