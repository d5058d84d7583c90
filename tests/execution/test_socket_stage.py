"""A stage between two neighbours that are played: what it computes, drops, refuses and tells."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.activations import InMessage, pack
from rayserve_sarathi.execution.handshake import make_secret
from rayserve_sarathi.execution.socket_stage import SocketStage
from rayserve_sarathi.execution.sockets import Connection, Listener, connect
from rayserve_sarathi.execution.stage import StageMessage
from rayserve_sarathi.execution.wire import Message, RelayedStep, encode
from rayserve_sarathi.step import StepOutput
from tests.execution.relays import LastRelay, Relay, make_step, output_of
from tests.execution.wired import HOST, TIMEOUT_S


class Neighbours:
    """The stages before and after the one that is tested: what they send and see."""

    def __init__(self, before: Connection, after: Connection) -> None:
        self._before = before
        self._after = after

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._before.send(encode(message))

    def send_bytes(self, data: bytes) -> None:
        self._before.send((data,))

    def leave(self) -> None:
        self._before.shut_down()

    def vanish_after(self) -> None:
        self._after.shut_down()

    def receive(self) -> RelayedStep:
        message = self._after.receive()
        assert isinstance(message, RelayedStep)
        return message

    def receive_end(self) -> None:
        assert self._after.receive() is None

    def before_is_told(self) -> None:
        self._before.wait_closed()


@contextlib.contextmanager
def between_neighbours(*, epoch: int = 0) -> Iterator[tuple[Neighbours, Future[None]]]:
    secret = make_secret()
    with contextlib.closing(Listener(HOST, secret=secret)) as after, ThreadPoolExecutor(1) as thread:
        stage = SocketStage(Relay(), name="stage 1", host=HOST, secret=secret, epoch=epoch, timeout_s=TIMEOUT_S)
        stage.connect(after.address)
        running = thread.submit(stage.run)
        with (
            contextlib.closing(connect(stage.address, secret=secret, timeout_s=TIMEOUT_S)) as upstream,
            contextlib.closing(after.accept(TIMEOUT_S)) as downstream,
        ):
            yield Neighbours(upstream, downstream), running
            upstream.shut_down()
            with contextlib.suppress(WireError):
                running.result(TIMEOUT_S)


def relayed_error(neighbours: Neighbours) -> tuple[int, str | None]:
    message = neighbours.receive()
    return message.step.step_id, None if message.fault is None else message.fault.message


@pytest.mark.parametrize(
    ("step_ids", "errors"),
    [
        ([7, 8, 9], [None, None, None]),
        ([0, 2, 3], [None, "steps 1 to 1 were lost before step 2", None]),
        ([0, 1, 1, 2], [None, None, "step 1 came again or too late, after step 1", None]),
        (
            [0, 2, 1, 3],
            [None, "steps 1 to 1 were lost before step 2", "step 1 came again or too late, after step 2", None],
        ),
    ],
    ids=["in-order", "lost", "duplicated", "reordered"],
)
def test_a_stage_computes_no_step_that_does_not_follow(step_ids: list[int], errors: list[str | None]):
    with between_neighbours() as (neighbours, _):
        neighbours.send(*map(make_step, step_ids))
        received = [relayed_error(neighbours) for _ in step_ids]

    assert received == [
        (step_id, None if error is None else f"stage 1: {error}")
        for step_id, error in zip(step_ids, errors, strict=True)
    ]


def test_a_stage_drops_steps_of_an_older_epoch():
    with between_neighbours(epoch=1) as (neighbours, _):
        neighbours.send(make_step(5), make_step(9, epoch=1), make_step(0, epoch=2), make_step(10, epoch=1))
        neighbours.send(make_step(1, epoch=2))
        received = [neighbours.receive().step for _ in range(3)]

    assert [(step.epoch, step.step_id) for step in received] == [(1, 9), (2, 0), (2, 1)]


def test_hidden_states_of_any_float_type_pass_through_a_stage():
    with between_neighbours() as (neighbours, _):
        for step_id, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
            hidden = torch.randn(4, 8).to(dtype)
            sent = pack(StageMessage(step=make_step(step_id), hidden=hidden), InMessage())
            neighbours.send(sent)
            received = neighbours.receive().hidden

            assert received is not None
            assert (received.dtype, received.shape) == (str(dtype).removeprefix("torch."), (4, 8))
            assert received.data is not None
            assert sent.hidden is not None
            assert sent.hidden.data is not None
            assert received.data.tobytes() == sent.hidden.data.tobytes()


def test_what_was_computed_is_sent_before_a_stage_follows_one_that_left():
    with between_neighbours() as (neighbours, running):
        neighbours.send(*map(make_step, range(50)))
        neighbours.leave()
        step_ids = [neighbours.receive().step.step_id for _ in range(50)]
        neighbours.receive_end()
        running.result(TIMEOUT_S)

    assert step_ids == list(range(50))


def test_a_stage_tells_the_one_before_that_the_next_has_left():
    with between_neighbours() as (neighbours, running):
        neighbours.vanish_after()
        neighbours.before_is_told()
        running.result(TIMEOUT_S)


def test_bytes_that_are_no_message_close_the_connection():
    with between_neighbours() as (neighbours, running):
        neighbours.send(make_step(0))
        neighbours.send_bytes(b"GET / HTTP/1.1\r\nHost: stage\r\n\r\n")

        assert neighbours.receive().step.step_id == 0
        with pytest.raises(WireError, match="begins with b'SRTH', got b'GET '"):
            running.result(TIMEOUT_S)
        neighbours.receive_end()


def test_a_stage_takes_no_outputs():
    with between_neighbours() as (neighbours, running):
        neighbours.send(output_of(make_step(0)))
        with pytest.raises(WireError, match="takes steps"):
            running.result(TIMEOUT_S)


def test_who_sends_does_not_wait_for_a_stage_that_computes():
    may_compute = threading.Event()

    class Slow(LastRelay):
        def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
            assert may_compute.wait(TIMEOUT_S)
            return super().launch(message, receive_s)

    secret = make_secret()
    stage = SocketStage(Slow(), name="stage 0", host=HOST, secret=secret, epoch=0)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(stage.run)
        with contextlib.closing(connect(stage.address, secret=secret, timeout_s=TIMEOUT_S)) as upstream:
            hidden = torch.zeros(1 << 10, 1 << 12)  # 16 MB, more than the kernel keeps
            for step_id in range(3):
                upstream.send(encode(pack(StageMessage(step=make_step(step_id), hidden=hidden), InMessage())))
            may_compute.set()
        running.result(TIMEOUT_S)


def test_a_stage_that_is_closed_before_anybody_came_ends():
    stage = SocketStage(Relay(), name="stage 0", host=HOST, secret=make_secret(), epoch=0)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(stage.run)
        stage.close()
        running.result(TIMEOUT_S)
    stage.run()  # and has nothing to do any more


def test_a_stage_to_which_nobody_comes_says_so():
    stage = SocketStage(Relay(), name="stage 0", host=HOST, secret=make_secret(), epoch=0, timeout_s=0.01)
    with pytest.raises(PipelineFaultError, match="nobody who knows the secret connected"):
        stage.run()
