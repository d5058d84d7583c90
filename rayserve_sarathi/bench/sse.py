"""Server-sent events, as the bytes of a stream arrive.

By the grammar of https://html.spec.whatwg.org/multipage/server-sent-events.html, of which only `data` matters here.
"""


class EventParser:
    """Cuts a stream of bytes into events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of each event that is complete with these bytes."""
        lines = (self._rest + data).splitlines(keepends=True)
        # A "\r" at the end may be the first half of "\r\n".
        self._rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        events = []
        for line in lines:
            content = line.rstrip(b"\r\n")
            if content.startswith(b"data:"):
                self._data.append(content[5:].removeprefix(b" "))
            elif not content and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
