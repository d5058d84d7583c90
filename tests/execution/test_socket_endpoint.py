"""The engine's end of a pipeline whose stages are played: what it sends, and what of the answers it takes."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from rayserve_sarathi.errors import PipelineFaultError
from rayserve_sarathi.execution.handshake import make_secret
from rayserve_sarathi.execution.socket_pipeline import SocketEndpoint, open_endpoint
from rayserve_sarathi.execution.sockets import Connection, Listener, connect
from rayserve_sarathi.execution.wire import Message, encode
from rayserve_sarathi.step import StepInput
from tests.execution.relays import make_step, output_of
from tests.execution.wired import HOST, TIMEOUT_S


class LastStage:
    """Plays all stages to an endpoint."""

    def __init__(self, endpoint: SocketEndpoint, inputs: Sequence[Connection], output: Connection) -> None:
        self.endpoint = endpoint
        self.inputs = inputs
        self._output = output

    def send(self, *messages: Message) -> None:
        for message in messages:
            self._output.send(encode(message))

    def send_bytes(self, data: bytes) -> None:
        self._output.send((data,))


@contextlib.asynccontextmanager
async def endpoint_alone(*, num_ranks: int = 1, epoch: int = 0) -> AsyncIterator[LastStage]:
    secret = make_secret()
    listener = Listener(HOST, secret=secret)
    ranks = [Listener(HOST, secret=secret) for _ in range(num_ranks)]
    output = await asyncio.to_thread(connect, listener.address, secret=secret, timeout_s=TIMEOUT_S)
    addresses = [rank.address for rank in ranks]
    endpoint = await open_endpoint(listener, addresses, secret=secret, epoch=epoch, timeout_s=TIMEOUT_S)
    inputs = [rank.accept(TIMEOUT_S) for rank in ranks]
    try:
        yield LastStage(endpoint, inputs, output)
    finally:
        await endpoint.close()
        for connection in (*inputs, output):
            connection.close()


async def test_all_ranks_of_the_first_stage_get_each_step():
    async with endpoint_alone(num_ranks=2) as stages:
        await stages.endpoint.submit(make_step(0))
        received = [await asyncio.to_thread(rank.receive) for rank in stages.inputs]

    assert [message.step_id for message in received if isinstance(message, StepInput)] == [0, 0]


OUTPUTS: dict[str, Callable[[], list[Message]]] = {
    "lost": lambda: [output_of(make_step(1))],
    "duplicated": lambda: [output_of(make_step(0)), output_of(make_step(0))],
    "reordered": lambda: [output_of(make_step(0)), output_of(make_step(2)), output_of(make_step(1))],
    "unknown-epoch": lambda: [output_of(make_step(0, epoch=1))],
    "no-output": lambda: [make_step(0)],
}


@pytest.mark.parametrize("sent", OUTPUTS)
async def test_outputs_other_than_what_is_due_are_a_fault(sent: str):
    async with endpoint_alone() as stages:
        for step_id in range(3):
            await stages.endpoint.submit(make_step(step_id))
        stages.send(*OUTPUTS[sent]())
        received, faults = [], []
        while len(faults) < 2:  # it is for good
            try:
                received.append(await asyncio.wait_for(stages.endpoint.receive(), TIMEOUT_S))
            except PipelineFaultError as fault:
                faults.append(fault.reason)

    assert [output.step_id for output in received] == list(range(len(received)))
    assert faults == ["lost_message", "lost_message"]


async def test_outputs_of_an_older_epoch_are_dropped():
    async with endpoint_alone(epoch=1) as stages:
        await stages.endpoint.submit(make_step(3, epoch=1))
        await stages.endpoint.submit(make_step(4, epoch=2))
        stages.send(output_of(make_step(2)), output_of(make_step(3, epoch=1)), output_of(make_step(4, epoch=2)))
        output = await asyncio.wait_for(stages.endpoint.receive(), TIMEOUT_S)

        assert (output.epoch, output.step_id) == (2, 4)


async def test_a_step_for_which_receive_waited_and_was_cancelled_is_not_lost():
    async with endpoint_alone() as stages:
        await stages.endpoint.submit(make_step(0))
        receiving = asyncio.create_task(stages.endpoint.receive())
        await asyncio.sleep(0)  # it waits now
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        stages.send(output_of(make_step(0)))

        assert (await asyncio.wait_for(stages.endpoint.receive(), TIMEOUT_S)).step_id == 0


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"SRTH" + b"\xff" * 12])
async def test_bytes_that_are_no_output_are_a_fault(data: bytes):
    async with endpoint_alone() as stages:
        await stages.endpoint.submit(make_step(0))
        stages.send_bytes(data)
        with pytest.raises(PipelineFaultError) as fault:
            await asyncio.wait_for(stages.endpoint.receive(), TIMEOUT_S)

    assert fault.value.reason == "lost_message"


async def test_a_first_stage_that_goes_is_a_fault():
    async with endpoint_alone(num_ranks=2) as stages:
        stages.inputs[1].shut_down()
        with pytest.raises(PipelineFaultError) as fault:
            await asyncio.wait_for(stages.endpoint.receive(), TIMEOUT_S)

    assert fault.value.reason == "died"


async def test_a_first_stage_that_cannot_be_reached_is_named():
    secret = make_secret()
    with socket.create_server((HOST, 0)) as free:
        address = (HOST, int(free.getsockname()[1]))
    with pytest.raises(PipelineFaultError, match=f"127.0.0.1:{address[1]} was not reached"):
        await open_endpoint(Listener(HOST, secret=secret), [address], secret=secret, epoch=0, timeout_s=TIMEOUT_S)
