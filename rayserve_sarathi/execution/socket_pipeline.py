"""The scheduler's end of a pipeline that is joined by sockets. It loads no torch."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.sockets import Address, Connection, Listener, connect
from rayserve_sarathi.execution.wire import FrameReader, Message, encode
from rayserve_sarathi.step import StepInput, StepOutput

logger = logging.getLogger(__name__)

_MAX_READ_BYTES = 1 << 18
"""Read at a time, so that a large message does not keep the event loop from everything else."""


class SocketEndpoint:
    """Sends steps to the first stage and takes what comes of them from the last; made by `open_endpoint`.

    A fault is for good: each call raises it, once the outputs that came before it are taken.

    Args:
        epoch: Outputs of an older one are dropped.
    """

    def __init__(self, *, epoch: int) -> None:
        self._epoch = epoch
        self._inputs: list[_Link] = []
        self._links: list[_Link] = []
        self._due: deque[int] = deque()
        self._outputs: deque[StepOutput] = deque()
        self._fault: tuple[str, str] | None = None
        self._changed = asyncio.Event()

    async def submit(self, step: StepInput) -> None:
        """Send a step to all ranks of the first stage.

        Raises:
            PipelineFaultError: The pipeline has failed.
        """
        self._check()
        if step.epoch > self._epoch:
            self._epoch = step.epoch
            self._due.clear()
        self._due.append(step.step_id)
        pieces = encode(step)
        for link in self._inputs:
            link.write(pieces)

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside; while there is none, for the next one.

        Raises:
            PipelineFaultError: A connection closed (`died`), or what came is not what is due (`lost_message`).
        """
        while not self._outputs:
            self._check()
            self._changed.clear()
            await self._changed.wait()
        return self._outputs.popleft()

    async def close(self) -> None:
        """Close all connections; the stages end as they notice."""
        for link in self._links:
            link.abort()
        await asyncio.gather(*(link.closed.wait() for link in self._links))

    async def add_input(self, connection: Connection) -> None:
        """Take over a connection to a rank of the first stage."""
        self._inputs.append(await self._add(connection, self._refuse))

    async def add_output(self, connection: Connection) -> None:
        """Take over the connection from the last stage."""
        await self._add(connection, self._take)

    async def _add(self, connection: Connection, deliver: Callable[[Message], None]) -> "_Link":
        link = _Link(connection.peer, deliver=deliver, fail=self._fail)
        sock = connection.detach()
        sock.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: link, sock=sock)
        self._links.append(link)
        return link

    def _check(self) -> None:
        if self._fault is not None:
            message, reason = self._fault
            raise PipelineFaultError(message, reason=reason)

    def _fail(self, message: str, reason: str) -> None:
        if self._fault is None:
            self._fault = (message, reason)
            self._changed.set()

    def _refuse(self, message: Message) -> None:
        raise WireError(f"the first stage sends nothing to the scheduler, got a {type(message).__name__}")

    def _take(self, output: Message) -> None:
        if not isinstance(output, StepOutput):
            raise WireError(f"the last stage sends outputs, got a {type(output).__name__}")
        if output.epoch < self._epoch:
            logger.warning("dropped the output of step %d of epoch %d", output.step_id, output.epoch)
        elif output.epoch == self._epoch and self._due and self._due[0] == output.step_id:
            self._outputs.append(output)
            self._due.popleft()
            self._changed.set()
        else:
            due = f"step {self._due[0]} of epoch {self._epoch}" if self._due else "none"
            raise WireError(f"step {output.step_id} of epoch {output.epoch} came out, where {due} was due")


async def open_endpoint(
    listener: Listener, first: Sequence[Address], *, secret: bytes, epoch: int, timeout_s: float
) -> SocketEndpoint:
    """Join the scheduler to the stages.

    Args:
        listener: Where rank 0 of the last stage connects; taken over.
        first: Where the ranks of the first stage listen.
        secret: Known to the processes of this pipeline alone; that of `listener`.
        epoch: Outputs of an older one are dropped.
        timeout_s: Longest time for each connection.

    Raises:
        PipelineFaultError: One was not made.
    """
    endpoint = SocketEndpoint(epoch=epoch)
    try:
        for address in first:
            await endpoint.add_input(await asyncio.to_thread(connect, address, secret=secret, timeout_s=timeout_s))
        await endpoint.add_output(await asyncio.to_thread(listener.accept, timeout_s))
    except BaseException:
        listener.close()
        await endpoint.close()
        raise
    return endpoint


class _Link(asyncio.BufferedProtocol):
    """A connection on the event loop: messages as they are complete, and its end.

    Args:
        peer: Who is at the other end.
        deliver: Takes a message; a WireError closes the connection.
        fail: Takes what happened and the reason of the fault.
    """

    def __init__(self, peer: str, *, deliver: Callable[[Message], None], fail: Callable[[str, str], None]) -> None:
        self._peer = peer
        self._deliver = deliver
        self._fail = fail
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None  # None before asyncio calls connection_made
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def get_buffer(self, sizehint: int) -> memoryview:
        """Of asyncio: where the next bytes belong."""
        return self._reader.missing[:_MAX_READ_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        """Of asyncio: so many bytes have come."""
        try:
            if (message := self._reader.advance(nbytes)) is not None:
                self._deliver(message)
        except WireError as error:
            logger.error("closes the connection with %s: %s", self._peer, error)
            self._fail(str(error), "lost_message")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._fail(f"the connection with {self._peer} closed" + (f": {exc}" if exc else ""), "died")
        self.closed.set()

    def write(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        """Send without waiting; what the kernel does not take at once is kept for later."""
        assert self._transport is not None
        for piece in pieces:
            self._transport.write(piece)

    def abort(self) -> None:
        """Close it at once."""
        assert self._transport is not None
        self._transport.abort()
