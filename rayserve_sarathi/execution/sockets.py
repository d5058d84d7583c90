"""Authenticated TCP connections between the processes of a pipeline, and the frames that go over them.

TCP on one host as well: unix-domain sockets took as long for 20 kB, 512 kB and 8 MB (Linux 6, loopback).
"""

import contextlib
import logging
import select
import socket
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.handshake import (
    ANSWER_BYTES,
    CONFIRMATION_BYTES,
    GREETING_BYTES,
    MIN_SECRET_BYTES,
    ConnectorHandshake,
    ListenerHandshake,
)
from rayserve_sarathi.execution.wire import Frame, FrameReader, Message

logger = logging.getLogger(__name__)

Address = tuple[str, int]
"""Host and port."""

_HANDSHAKE_TIMEOUT_S = 5.0
_MAX_STRANGERS = 64
"""Peers in a handshake at a time; the oldest gives way to the newest."""
_MAX_PIECES = 512
"""Of a single `sendmsg`; Linux takes 1024."""
_LIVENESS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_USER_TIMEOUT": 30_000}
"""A network that carries nothing any more ends a connection after about 30 s; Linux would take two hours where nothing
is sent, and a quarter of one otherwise. Seconds, seconds, milliseconds; other systems lack some of them."""


class Connection:
    """Frames in both directions, for threads that may block; one may send while another receives.

    Args:
        sock: Connected and authenticated; taken over.
        peer: Who is at the other end, for messages.
    """

    def __init__(self, sock: socket.socket, *, peer: str) -> None:
        sock.setblocking(True)
        # A step waits for its last bytes, which must not wait for others to fill a packet.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _LIVENESS.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._socket = sock
        self._reader = FrameReader()
        self.peer = peer

    def send(self, frame: Frame) -> None:
        """Send a frame; its arrays are not copied on the way to the kernel.

        Raises:
            OSError: The connection is closed.
        """
        pieces = [memoryview(piece) for piece in frame]
        while pieces:
            num_bytes = self._socket.sendmsg(pieces[:_MAX_PIECES])
            while pieces and num_bytes >= len(pieces[0]):
                num_bytes -= len(pieces.pop(0))
            if num_bytes:
                pieces[0] = pieces[0][num_bytes:]

    def receive(self) -> Message | None:
        """Wait for a message; None if the peer closed the connection after the last one.

        Raises:
            OSError: The connection broke.
            WireError: What came is no message.
        """
        while num_bytes := self._socket.recv_into(self._reader.missing):
            if (message := self._reader.advance(num_bytes)) is not None:
                return message
        if not self._reader.is_between_frames:
            raise WireError(f"{self.peer} closed the connection within a message")
        return None

    def wait_closed(self) -> None:
        """Wait until the peer closes a connection in which it has nothing to say."""
        with contextlib.suppress(OSError):
            self._socket.recv(1)

    def shut_down(self) -> None:
        """End it, after what was sent: threads that wait in it return, and the peer is told."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free it; no thread may be in it."""
        self.shut_down()
        self._socket.close()

    def detach(self) -> socket.socket:
        """Give the socket away; this object is of no use any more."""
        return self._socket


class Listener:
    """Waits on a port, the kernel's choice, for one peer that knows the secret; drops all others.

    Args:
        host: Name or address to listen at, and to tell the peer.
        secret: Known to the processes of this pipeline alone.
        handshake_timeout_s: A peer that has not proved by then that it knows the secret is dropped.
    """

    def __init__(self, host: str, *, secret: bytes, handshake_timeout_s: float = _HANDSHAKE_TIMEOUT_S) -> None:
        assert len(secret) >= MIN_SECRET_BYTES, f"a secret of {len(secret)} bytes can be guessed"
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, 0), family=family, backlog=_MAX_STRANGERS)
        self._socket.setblocking(False)
        self._secret = secret
        self._handshake_timeout_s = handshake_timeout_s
        self._strangers: dict[int, _Stranger] = {}
        self._connection: Future[Connection] = Future()
        self._is_accepted = False
        self.address: Address = (host, self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._listen, name=f"listen-{self.address[1]}", daemon=True)
        self._thread.start()

    def accept(self, timeout_s: float) -> Connection:
        """Wait for the peer; the port is closed after it.

        Raises:
            PipelineFaultError: It did not come, or the listener was closed.
        """
        try:
            connection = self._connection.result(timeout_s)
            self._is_accepted = True
            return connection
        except FutureTimeoutError:
            self.close()
            raise PipelineFaultError(
                f"nobody who knows the secret connected to {_name(self.address)} within {timeout_s:g} s", reason="died"
            ) from None

    def close(self) -> None:
        """Stop listening; who waits in `accept` is told so, and a peer that nobody accepted is dropped."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        if not self._is_accepted and self._connection.exception() is None:
            self._connection.result().close()

    def _listen(self) -> None:
        try:
            connection = self._find_peer()
        except _ListenerClosedError:
            self._connection.set_exception(
                PipelineFaultError(f"the listener at {_name(self.address)} was closed", reason="died")
            )
        else:
            self._connection.set_result(connection)

    def _find_peer(self) -> Connection:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        try:
            while True:
                for descriptor, _ in poll.poll(self._milliseconds_left()):
                    if descriptor == self._socket.fileno():
                        self._welcome(poll)
                    elif (connection := self._hear(poll, descriptor)) is not None:
                        return connection
                now_s = time.monotonic()
                for descriptor in [fd for fd, stranger in self._strangers.items() if stranger.deadline_s <= now_s]:
                    self._drop(poll, descriptor, f"it did not answer within {self._handshake_timeout_s:g} s")
        finally:
            for stranger in self._strangers.values():
                stranger.socket.close()
            self._socket.close()

    def _milliseconds_left(self) -> float | None:
        """Return until when the first handshake has to end; None where there is none."""
        if not self._strangers:
            return None
        first_s = min(stranger.deadline_s for stranger in self._strangers.values())
        return max(first_s - time.monotonic(), 0.0) * 1e3 + 1

    def _welcome(self, poll: "select.poll") -> None:
        try:
            sock, address = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return  # it left again
        except OSError:
            raise _ListenerClosedError from None
        sock.setblocking(False)
        if len(self._strangers) >= _MAX_STRANGERS:
            self._drop(poll, next(iter(self._strangers)), "newer ones wait")
        stranger = _Stranger(sock, _name(address), self._secret, time.monotonic() + self._handshake_timeout_s)
        self._strangers[sock.fileno()] = stranger
        poll.register(sock, select.POLLIN)
        try:
            sock.send(stranger.handshake.greeting)
        except OSError as error:
            self._drop(poll, sock.fileno(), str(error))

    def _hear(self, poll: "select.poll", descriptor: int) -> Connection | None:
        if (stranger := self._strangers.get(descriptor)) is None:
            return None  # dropped since
        try:
            if not stranger.receive():
                return None
            stranger.socket.send(stranger.handshake.confirm(bytes(stranger.answer)))
            connection = Connection(stranger.socket, peer=stranger.name)
        except (OSError, WireError) as error:
            self._drop(poll, descriptor, str(error))
            return None
        del self._strangers[descriptor]
        return connection

    def _drop(self, poll: "select.poll", descriptor: int, reason: str) -> None:
        stranger = self._strangers.pop(descriptor)
        logger.warning("dropped a connection to %s from %s: %s", _name(self.address), stranger.name, reason)
        poll.unregister(descriptor)
        stranger.socket.close()


class _ListenerClosedError(Exception):
    """The listening socket was shut down."""


class _Stranger:
    """A peer that has yet to prove that it knows the secret."""

    def __init__(self, sock: socket.socket, name: str, secret: bytes, deadline_s: float) -> None:
        self.socket = sock
        self.name = name
        self.handshake = ListenerHandshake(secret)
        self.deadline_s = deadline_s
        self.answer = bytearray()

    def receive(self) -> bool:
        """Take what it sent; return whether its answer is complete."""
        try:
            data = self.socket.recv(ANSWER_BYTES - len(self.answer))
        except BlockingIOError:
            return False
        if not data:
            raise WireError("it left before it proved that it knows the secret")
        self.answer += data
        return len(self.answer) == ANSWER_BYTES


def connect(address: Address, *, secret: bytes, timeout_s: float) -> Connection:
    """Connect to a `Listener`.

    Raises:
        PipelineFaultError: It cannot be reached in time, or does not know the secret.
    """
    deadline_s = time.monotonic() + timeout_s
    try:
        sock = socket.create_connection(address, timeout=timeout_s)
        try:
            handshake = ConnectorHandshake(secret)
            sock.sendall(handshake.answer(_receive_exactly(sock, GREETING_BYTES, deadline_s)))
            handshake.check(_receive_exactly(sock, CONFIRMATION_BYTES, deadline_s))
            return Connection(sock, peer=_name(address))
        except BaseException:
            sock.close()
            raise
    except TimeoutError:
        raise PipelineFaultError(
            f"{_name(address)} was not reached: no answer within {timeout_s:g} s", reason="died"
        ) from None
    except (OSError, WireError) as error:
        raise PipelineFaultError(f"{_name(address)} was not reached: {error}", reason="died") from error


def _receive_exactly(sock: socket.socket, num_bytes: int, deadline_s: float) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        sock.settimeout(max(deadline_s - time.monotonic(), 1e-3))
        part = sock.recv(num_bytes - len(data))
        if not part:
            raise WireError("it closed the connection; is the secret the right one?")
        data += part
    return bytes(data)


def _name(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
