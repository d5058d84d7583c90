"""Connections: the right peer gets in, nobody else does, and nobody else is in the way."""

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.activations import InMessage, pack
from rayserve_sarathi.execution.handshake import (
    ANSWER_BYTES,
    CONFIRMATION_BYTES,
    GREETING_BYTES,
    ConnectorHandshake,
    ListenerHandshake,
    make_secret,
)
from rayserve_sarathi.execution.sockets import Connection, Listener, connect
from rayserve_sarathi.execution.stage import StageMessage
from rayserve_sarathi.execution.wire import encode
from tests.execution.messages import are_equal
from tests.stages import Chunk, make_step

HOST = "127.0.0.1"
SECRET = make_secret()
TIMEOUT_S = 30.0
STEP = make_step(Chunk(token_ids=[1], block_ids=[0]))


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener(HOST, secret=SECRET)
    yield listener
    listener.close()


@contextlib.contextmanager
def connected(listener: Listener) -> Iterator[tuple[Connection, Connection]]:
    """Connect as the right peer; yield its end and the listener's."""
    with (
        contextlib.closing(connect(listener.address, secret=SECRET, timeout_s=TIMEOUT_S)) as ours,
        contextlib.closing(listener.accept(TIMEOUT_S)) as theirs,
    ):
        yield ours, theirs


def test_messages_go_both_ways(listener: Listener):
    with connected(listener) as (ours, theirs):
        ours.send(encode(STEP))
        theirs.send(encode(STEP))

        assert are_equal(theirs.receive(), STEP)
        assert are_equal(ours.receive(), STEP)


def test_a_message_larger_than_all_buffers_arrives_while_its_sender_waits(listener: Listener):
    hidden = torch.randn(1 << 10, 1 << 12)  # 16 MB
    message = pack(StageMessage(step=STEP, hidden=hidden), InMessage())
    with connected(listener) as (ours, theirs), ThreadPoolExecutor(1) as thread:
        sent = thread.submit(ours.send, encode(message))

        assert are_equal(theirs.receive(), message)
        sent.result(TIMEOUT_S)


def test_a_frame_of_many_pieces_arrives(listener: Listener):
    # More pieces than the kernel takes at a time.
    frame = encode(STEP)
    many = frame * 3000
    with connected(listener) as (ours, theirs), ThreadPoolExecutor(1) as thread:
        thread.submit(ours.send, many)

        assert all(are_equal(theirs.receive(), STEP) for _ in range(3000))


def test_the_end_of_a_connection_is_not_a_message(listener: Listener):
    with connected(listener) as (ours, theirs):
        ours.send(encode(STEP))
        ours.close()

        assert theirs.receive() is not None
        assert theirs.receive() is None


def test_the_end_of_a_connection_within_a_message_is_an_error(listener: Listener):
    with connected(listener) as (ours, theirs):
        frame = encode(STEP)
        ours.send((b"".join(frame)[:-1],))
        ours.close()

        with pytest.raises(WireError, match="closed the connection within a message"):
            theirs.receive()


def test_a_thread_that_waits_for_messages_ends_when_the_connection_is_shut_down(listener: Listener):
    with connected(listener) as (_, theirs), ThreadPoolExecutor(1) as thread:
        receiving = thread.submit(theirs.receive)
        theirs.shut_down()

        assert receiving.result(TIMEOUT_S) is None


def test_the_port_is_closed_once_the_peer_is_in(listener: Listener):
    with connected(listener), pytest.raises(PipelineFaultError, match="refused"):
        connect(listener.address, secret=SECRET, timeout_s=TIMEOUT_S)


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=1, max_size=2 * ANSWER_BYTES))
def test_random_bytes_change_nothing_for_the_right_peer(data: bytes):
    with (
        contextlib.closing(Listener(HOST, secret=SECRET)) as listener,
        socket.create_connection(listener.address, TIMEOUT_S) as stranger,
    ):
        stranger.sendall(data)
        with connected(listener) as (ours, theirs):
            ours.send(encode(STEP))

            assert are_equal(theirs.receive(), STEP)


def test_silent_peers_are_in_nobodys_way(listener: Listener):
    with contextlib.ExitStack() as strangers:
        for _ in range(100):  # more than may wait at a time
            strangers.enter_context(socket.create_connection(listener.address, TIMEOUT_S))
        with connected(listener) as (ours, theirs):
            ours.send(encode(STEP))

            assert theirs.receive() is not None


def test_a_silent_peer_is_dropped_and_logged(caplog: pytest.LogCaptureFixture):
    with (
        contextlib.closing(Listener(HOST, secret=SECRET, handshake_timeout_s=0.01)) as listener,
        socket.create_connection(listener.address, TIMEOUT_S) as stranger,
    ):
        assert len(stranger.recv(1000)) == GREETING_BYTES
        assert stranger.recv(1000) == b""  # closed by the other end

    assert "it did not answer within 0.01 s" in caplog.text


def test_a_peer_with_another_secret_is_told_nothing_and_logged(listener: Listener, caplog: pytest.LogCaptureFixture):
    with pytest.raises(PipelineFaultError, match=r"127.0.0.1:\d+ was not reached: .* is the secret the right one"):
        connect(listener.address, secret=make_secret(), timeout_s=TIMEOUT_S)
    with connected(listener):
        assert "it does not know the secret of this pipeline" in caplog.text


def test_a_recorded_handshake_does_not_work_twice():
    first, second = ListenerHandshake(SECRET), ListenerHandshake(SECRET)
    peer = ConnectorHandshake(SECRET)
    answer = peer.answer(first.greeting)
    peer.check(first.confirm(answer))

    with pytest.raises(WireError, match="does not know the secret"):
        second.confirm(answer)


def test_a_listener_that_does_not_know_the_secret_is_refused():
    impostor = ListenerHandshake(make_secret())
    peer = ConnectorHandshake(SECRET)
    answer = peer.answer(impostor.greeting)

    with pytest.raises(WireError, match="does not know the secret"):
        peer.check(answer[-CONFIRMATION_BYTES:])  # the peer's own proof, sent back


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 40, b"", b"SRTH-01\n"])
def test_what_listens_but_is_no_stage_is_named(greeting: bytes):
    with socket.create_server((HOST, 0)) as other, ThreadPoolExecutor(1) as thread:
        connecting = thread.submit(connect, other.getsockname()[:2], secret=SECRET, timeout_s=TIMEOUT_S)
        peer, _ = other.accept()
        with contextlib.closing(peer), contextlib.suppress(OSError):  # it leaves as soon as it has seen enough
            peer.sendall(greeting)
            peer.shutdown(socket.SHUT_WR)
        with pytest.raises(PipelineFaultError, match=f"{HOST}:{other.getsockname()[1]} was not reached"):
            connecting.result(TIMEOUT_S)


def test_what_accepts_but_never_answers_is_given_up_and_named():
    with socket.create_server((HOST, 0)) as silent:
        address = silent.getsockname()[:2]
        with pytest.raises(PipelineFaultError, match=f"{HOST}:{address[1]} was not reached: no answer within 0.05 s"):
            connect(address, secret=SECRET, timeout_s=0.05)


def test_a_peer_that_never_comes_is_given_up(listener: Listener):
    with pytest.raises(PipelineFaultError, match=r"nobody who knows the secret connected to 127.0.0.1:\d+ within"):
        listener.accept(0.01)


def test_who_waits_for_a_peer_hears_that_the_listener_is_closed(listener: Listener):
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(listener.accept, TIMEOUT_S)
        listener.close()
        with pytest.raises(PipelineFaultError, match="was closed"):
            waiting.result(TIMEOUT_S)


def test_a_peer_that_nobody_accepted_is_let_go(listener: Listener):
    with contextlib.closing(connect(listener.address, secret=SECRET, timeout_s=TIMEOUT_S)) as ours:
        listener.close()

        assert ours.receive() is None
