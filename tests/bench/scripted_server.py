"""A server that answers `/v1/completions` with bytes that a test writes down, whatever it is asked."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def part(content: bytes) -> bytes:
    """Frame a part of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(content), content)


def event(value: object) -> bytes:
    """Return a server-sent event."""
    return b"data: %b\n\n" % json.dumps(value).encode()


def token(text: str = "a", *, num_tokens: int | None = None) -> dict[str, object]:
    """A chunk with text; with the number of tokens so far if the server tells it."""
    chunk: dict[str, object] = {"choices": [{"index": 0, "text": text, "finish_reason": None}]}
    if num_tokens is not None:
        chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": num_tokens}
    return chunk


def total(num_tokens: int) -> dict[str, object]:
    """The last chunk, with the usage alone."""
    return {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": num_tokens}}


DONE = b"data: [DONE]\n\n"


def stream(*parts: bytes, is_whole: bool = True) -> Answer:
    """Answer with a stream of these parts, each sent by itself; without its end if it is not whole."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for content in parts:
            writer.write(part(content))
            await writer.drain()
            await asyncio.sleep(0)
        if is_whole:
            writer.write(END)
        else:
            writer.close()

    return answer


def refusal(status: str, body: bytes, *headers: str) -> Answer:
    """Answer with an HTTP error."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "content-type: application/json", *headers]
        writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)

    return answer


async def silence(writer: asyncio.StreamWriter) -> None:
    """Answer with a first token, then never again."""
    writer.write(STREAM_HEAD + part(event(token(num_tokens=1))))
    await asyncio.Event().wait()


@asynccontextmanager
async def scripted_server(
    answers: Sequence[Answer],
    *,
    bodies: list[dict[str, object]] | None = None,
    note_connection: Callable[[], None] = lambda: None,
) -> AsyncIterator[str]:
    """Serve; yield the URL. The first request gets the first answer, and so on; the last one is repeated.

    Args:
        answers: What to answer with.
        bodies: Gets the body of each request.
        note_connection: Called for each.
    """
    num_answered = 0
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_answered
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        note_connection()
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                ]
                body = await reader.readexactly(sum(lengths))
                if bodies is not None and body:
                    bodies.append(json.loads(body))
                answer = answers[min(num_answered, len(answers) - 1)]
                num_answered += 1
                await answer(writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            handlers.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(handlers):
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
