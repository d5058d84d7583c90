"""Stages joined by sockets: the inline pipeline's tokens, overlap, faults of a step, death, lost messages."""

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rayserve_sarathi.engine import Engine, RebuildLimit
from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.activations import InMessage, pack
from rayserve_sarathi.execution.handshake import make_secret
from rayserve_sarathi.execution.inline import InlinePipeline
from rayserve_sarathi.execution.socket_pipeline import SocketEndpoint, open_endpoint
from rayserve_sarathi.execution.socket_stage import SocketStage
from rayserve_sarathi.execution.sockets import Connection, Listener, connect
from rayserve_sarathi.execution.stage import LaunchedStep, StageMessage
from rayserve_sarathi.execution.wire import MAX_HEADER_BYTES, Message, RelayedStep, encode
from rayserve_sarathi.request import RequestOutput, SamplingParams
from rayserve_sarathi.step import StageTiming, StepFault, StepInput, StepOutput
from tests.execution.wired import HOST, TIMEOUT_S, make_stages, make_steps, wired
from tests.factories import make_scheduler
from tests.servable import save_servable


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough that computing a step takes much longer than sending it.
    return save_servable(tmp_path_factory.mktemp("servable"), num_layers=4, hidden_size=256)


async def generate(pipeline: object, prompts: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Run the engine's loop over a pipeline until all prompts have their tokens."""
    tokens: dict[str, list[int]] = {f"request-{index}": [] for index in range(len(prompts))}
    unfinished = set(tokens)
    done = asyncio.Event()

    def deliver(outputs: list[RequestOutput]) -> None:
        for output in outputs:
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                unfinished.discard(output.request_id)
        if not unfinished:
            done.set()

    scheduler = make_scheduler(
        num_blocks=64, block_size=16, token_budget=48, max_steps_in_flight=3, num_decode_groups=2, max_model_len=256
    )
    engine = Engine(scheduler, pipeline, deliver=deliver, rebuild_limit=RebuildLimit(0, window_s=1.0))  # type: ignore[arg-type]
    for request_id, prompt in zip(tokens, prompts, strict=True):
        sampling = SamplingParams(max_tokens=12, temperature=0.7, seed=1, logprobs=2, presence_penalty=0.5)
        engine.add(request_id, prompt, sampling)
    running = asyncio.create_task(engine.run())
    async with asyncio.timeout(60):
        await done.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return tokens


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_tokens_are_those_of_the_inline_pipeline(checkpoint: Path, num_stages: int):
    prompts = [list(range(index, 3 * index + 20)) for index in range(1, 9)]
    stages = make_stages(checkpoint, num_stages=num_stages)
    inline = InlinePipeline([stages], step_timeout_s=TIMEOUT_S)
    expected = await generate(inline, prompts)
    await inline.close()
    async with wired(stages) as pipeline:
        tokens = await generate(pipeline.endpoint, prompts)

    assert tokens == expected
    assert all(len(token_ids) == 12 for token_ids in tokens.values())


async def test_stages_work_on_different_steps_at_the_same_time(checkpoint: Path):
    async with wired(make_stages(checkpoint, num_stages=2)) as pipeline:
        outputs = await pipeline.run(make_steps(4))

    assert [output.step_id for output in outputs] == [0, 1, 2, 3]
    for earlier, later in itertools.pairwise(outputs):
        # Stage 0 begins the next step before stage 1 has ended this one.
        assert later.timings[0].start_s < earlier.timings[1].end_s
    for output in outputs:
        first, second = output.timings
        assert (first.stage, second.stage) == (0, 1)
        assert first.receive_s <= first.start_s < first.end_s <= second.receive_s <= second.start_s < second.end_s
    # Each was there while the one before was computed: what it waited for was the stage, not the way.
    assert outputs[-1].timings[0].receive_s < outputs[-2].timings[0].end_s


async def test_a_step_that_a_stage_cannot_compute_fails_alone(checkpoint: Path):
    good, second = make_steps(2)
    bad = replace(good, token_ids=good.token_ids + 1_000_000)  # outside of the embedding
    async with wired(make_stages(checkpoint, num_stages=2)) as pipeline:
        outputs = await pipeline.run([bad, replace(good, step_id=1), replace(second, step_id=2)])

    assert outputs[0].fault is not None
    assert "stage 0 failed" in outputs[0].fault.message
    assert (outputs[0].fault.stage, len(outputs[0].timings)) == (0, 2)
    assert [output.fault for output in outputs[1:]] == [None, None]
    assert outputs[2].token_ids.shape == (1,)


async def test_a_step_is_launched_while_the_one_before_is_waited_for():
    stage = DeviceRelay()
    async with wired([Relay(), stage]) as pipeline:
        outputs = await pipeline.run([make_step(0), make_step(1)])

    assert [output.step_id for output in outputs] == [0, 1]
    assert stage.has_launched.is_set(), "the first step waits for the second one's launch"


async def test_an_output_too_large_to_send_fails_its_step_alone():
    async with wired([Relay(), VerboseRelay()]) as pipeline:
        outputs = await pipeline.run([make_step(0), make_step(1)])

    assert outputs[0].fault is not None
    assert (outputs[0].fault.stage, outputs[0].fault.is_stage_broken) == (1, False)
    assert "the most are 16777216" in outputs[0].fault.message
    assert outputs[1].fault is None


@pytest.mark.parametrize("closed", [0, 1, 2])
async def test_a_stage_that_goes_is_noticed_even_without_a_step(closed: int):
    async with wired([Relay(), Relay(), LastRelay()]) as pipeline:
        await pipeline.run([make_step(0)])
        receiving = asyncio.create_task(pipeline.receive())
        pipeline.stages[closed].close()
        with pytest.raises(PipelineFaultError, match=r"the connection with 127.0.0.1:\d+ closed") as fault:
            await receiving
        with pytest.raises(PipelineFaultError):
            await pipeline.endpoint.submit(make_step(1))

    assert fault.value.reason == "died"


async def test_the_same_stages_are_joined_anew_after_a_fault(checkpoint: Path):
    steps = make_steps(2)
    stages = make_stages(checkpoint, num_stages=2)
    async with wired(stages) as pipeline:
        before = await pipeline.run(steps)
        pipeline.stages[1].close()
        with pytest.raises(PipelineFaultError):
            await pipeline.receive()
    async with wired(stages, epoch=1) as pipeline:
        after = await pipeline.run([replace(step, epoch=1, step_id=step.step_id + 2) for step in steps])

    assert [output.step_id for output in after] == [2, 3]
    assert after[-1].token_ids.tolist() == before[-1].token_ids.tolist() != []


# What follows is about messages, so stages compute nothing.


class Relay:
    """A stage that passes on what it gets."""

    index = 0

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
        assert receive_s is not None
        timing = StageTiming(stage=0, receive_s=receive_s, start_s=receive_s, end_s=receive_s)
        return replace(message, timings=(*message.timings, timing))


class LastRelay:
    """A last stage that turns what it gets into an output."""

    index = 1

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
        return output_of(message.step, fault=message.fault)


class DeviceRelay(LastRelay):
    """A last stage with a device: the first step is done when the second one has been given to it."""

    def __init__(self) -> None:
        self.has_launched = threading.Event()

    def launch(self, message: StageMessage, receive_s: float | None = None) -> LaunchedStep:
        if message.step.step_id == 1:
            self.has_launched.set()
        output = output_of(message.step)
        return LaunchedStep(lambda: output if self.has_launched.wait(TIMEOUT_S) else replace(output, step_id=-1))


class VerboseRelay(LastRelay):
    """A last stage that has too much to say of the first step."""

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
        output = output_of(message.step)
        return output if output.step_id else replace(output, errors={0: "x" * MAX_HEADER_BYTES})


def output_of(step: StepInput, *, fault: StepFault | None = None) -> StepOutput:
    return StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=np.zeros(1, np.int32), fault=fault)


def make_step(step_id: int, *, epoch: int = 0) -> StepInput:
    return replace(make_steps(1, num_tokens=4)[0], step_id=step_id, epoch=epoch)


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
