"""Stages on threads of the test process, joined by sockets."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.activations import ActivationPath, InMessage
from rayserve_sarathi.execution.handshake import make_secret
from rayserve_sarathi.execution.socket_pipeline import SocketEndpoint, open_endpoint
from rayserve_sarathi.execution.socket_stage import Executor, SocketStage
from rayserve_sarathi.execution.sockets import Listener
from rayserve_sarathi.execution.stage import Stage
from rayserve_sarathi.request import Request, SamplingParams
from rayserve_sarathi.step import StepInput, StepOutput
from tests.factories import make_scheduler

HOST = "127.0.0.1"
TIMEOUT_S = 30.0
NUM_BLOCKS = 64


def make_stages(checkpoint: Path, *, num_stages: int) -> list[Stage]:
    """Load all stages of a model, as `make_inline_pipeline` does."""
    config = EngineConfig(
        model=str(checkpoint), device="cpu", pipeline_parallel_size=num_stages, num_gpu_blocks_override=NUM_BLOCKS
    )
    stages = [Stage(config, index=index) for index in range(num_stages)]
    for stage in stages:
        stage.load()
        stage.start(NUM_BLOCKS)
    return stages


def make_steps(num_steps: int, *, num_tokens: int = 64) -> list[StepInput]:
    """Return the first steps of one long prompt, a chunk each."""
    scheduler = make_scheduler(block_size=16, num_blocks=64, token_budget=num_tokens, max_steps_in_flight=num_steps)
    scheduler.add(Request("long", list(range(1, num_steps * num_tokens + 1)), SamplingParams(max_tokens=1)))
    steps = [scheduler.schedule(0.0) for _ in range(num_steps)]
    return [step for step in steps if step is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wired:
    """A pipeline that is joined, and runs."""

    endpoint: SocketEndpoint
    stages: Sequence[SocketStage]
    threads: Sequence[threading.Thread]

    async def run(self, steps: Iterable[StepInput]) -> list[StepOutput]:
        """Submit all steps, then take what comes of them."""
        num_steps = 0
        for step in steps:
            await self.endpoint.submit(step)
            num_steps += 1
        return [await self.receive() for _ in range(num_steps)]

    async def receive(self) -> StepOutput:
        """Take an output, within a deadline."""
        return await asyncio.wait_for(self.endpoint.receive(), TIMEOUT_S)


@contextlib.asynccontextmanager
async def wired(
    stages: Sequence[Executor],
    *,
    epoch: int = 0,
    links: Sequence[tuple[ActivationPath, ActivationPath]] | None = None,
) -> AsyncIterator[Wired]:
    """Join stages in a row, and part them afterwards.

    Args:
        stages: First to last.
        epoch: That of the steps.
        links: Both ends of the way of hidden states between each stage and the next; None for the messages.
    """
    links = links or [(InMessage(), InMessage()) for _ in stages[1:]]
    senders: list[ActivationPath] = [*(sender for sender, _ in links), InMessage()]
    receivers: list[ActivationPath] = [InMessage(), *(receiver for _, receiver in links)]
    secret = make_secret()
    listener = Listener(HOST, secret=secret)
    sockets = [
        SocketStage(
            stage,
            name=f"stage {index}",
            host=HOST,
            secret=secret,
            epoch=epoch,
            timeout_s=TIMEOUT_S,
            receive_by=receiver,
            send_by=sender,
        )
        for index, (stage, receiver, sender) in enumerate(zip(stages, receivers, senders, strict=True))
    ]
    addresses = [*(stage.address for stage in sockets[1:]), listener.address]
    threads = [threading.Thread(target=stage.run) for stage in sockets]
    for stage, address, thread in zip(sockets, addresses, threads, strict=True):
        await asyncio.to_thread(stage.connect, address)
        thread.start()
    endpoint = await open_endpoint(listener, [sockets[0].address], secret=secret, epoch=epoch, timeout_s=TIMEOUT_S)
    try:
        yield Wired(endpoint=endpoint, stages=sockets, threads=threads)
    finally:
        await endpoint.close()
        for thread in threads:
            await asyncio.to_thread(thread.join, TIMEOUT_S)
            assert not thread.is_alive(), f"{thread.name} goes on after the scheduler has left"
