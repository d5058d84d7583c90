"""How fast one machine reaches another by TCP, as stages and ranks do.

The protocol: a byte is answered by a byte, some times; then comes a load, which a byte acknowledges.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

LOAD_BYTES = 8 * 1024 * 1024
_NUM_PINGS = 8
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """What a link can do.

    Args:
        round_trip_s: Least of some.
        bytes_per_s: Over `LOAD_BYTES`, its acknowledgement included.
    """

    round_trip_s: float
    bytes_per_s: float


@contextmanager
def listen(host: str, *, timeout_s: float) -> Iterator[int]:
    """Answer `probe` on a free port of `host`, which is yielded. A client that stalls is left after `timeout_s`."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, 0), family=family) as listener:
        accepting = threading.Thread(target=_accept, args=(listener, timeout_s), name="links", daemon=True)
        accepting.start()
        yield int(listener.getsockname()[1])
        # Closing alone would not wake the thread.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        accepting.join(timeout_s)


def probe(host: str, port: int, *, timeout_s: float) -> LinkSpeed:
    """Measure the link to a host that listens.

    Raises:
        TimeoutError: It took longer than `timeout_s`, all in all.
        OSError: There is no connection, or it broke.
    """
    deadline_s = time.monotonic() + timeout_s
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def await_byte() -> None:
            connection.settimeout(max(0.001, deadline_s - time.monotonic()))
            if not connection.recv(1):
                raise ConnectionError("the other side closed the connection")

        round_trips_s = []
        for _ in range(_NUM_PINGS):
            begin_s = time.perf_counter()
            connection.sendall(b"p")
            await_byte()
            round_trips_s.append(time.perf_counter() - begin_s)
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        begin_s = time.perf_counter()
        connection.sendall(bytes(LOAD_BYTES))
        await_byte()
        return LinkSpeed(
            round_trip_s=min(round_trips_s), bytes_per_s=LOAD_BYTES / max(1e-9, time.perf_counter() - begin_s)
        )


def _accept(listener: socket.socket, timeout_s: float) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # it was closed
            return
        threading.Thread(target=_answer, args=(connection, timeout_s), name="link", daemon=True).start()


def _answer(connection: socket.socket, timeout_s: float) -> None:
    # Whatever breaks the connection, the other side is the one that tells.
    with connection, suppress(OSError):
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_NUM_PINGS):
            if not connection.recv(1):
                return
            connection.sendall(b"p")
        buffer = bytearray(_CHUNK_BYTES)
        num_missing = LOAD_BYTES
        while num_missing:
            num_read = connection.recv_into(buffer, min(num_missing, _CHUNK_BYTES))
            if not num_read:
                return
            num_missing -= num_read
        connection.sendall(b"p")
