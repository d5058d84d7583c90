"""A link is measured, and one that does not work costs no more than the deadline."""

import socket
import threading
import time

import pytest

from rayserve_sarathi.links import listen, probe


def test_a_link_is_measured_by_several_at_once_and_again():
    with listen("127.0.0.1", timeout_s=5) as port:
        speeds = [probe("127.0.0.1", port, timeout_s=5) for _ in range(3)]

    assert all(0 < speed.round_trip_s < 1 for speed in speeds)
    assert all(speed.bytes_per_s > 1e6 for speed in speeds)


def test_nobody_listens_any_more_once_it_is_over():
    with listen("127.0.0.1", timeout_s=5) as port:
        pass
    with pytest.raises(ConnectionRefusedError):
        probe("127.0.0.1", port, timeout_s=5)


def test_one_who_accepts_and_says_nothing_is_left_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin_s = time.monotonic()
        with pytest.raises(TimeoutError):
            probe("127.0.0.1", silent.getsockname()[1], timeout_s=0.3)
        assert time.monotonic() - begin_s < 5


def test_one_who_hangs_up_is_an_error():
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        port = server.getsockname()[1]

        def hang_up() -> None:
            server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(OSError, match=r"closed the connection|reset|pipe"):
            probe("127.0.0.1", port, timeout_s=5)
        thread.join(5)
