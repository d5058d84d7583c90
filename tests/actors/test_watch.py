"""How a pipeline watches its stages while it waits for a step, with stages and messages that a test holds back."""

import asyncio
from typing import cast

import numpy as np
import pytest

from rayserve_sarathi.actors import pipeline as pipeline_module
from rayserve_sarathi.actors.pipeline import ActorPipeline
from rayserve_sarathi.actors.stage_group import StageGroup
from rayserve_sarathi.errors import PipelineFaultError
from rayserve_sarathi.step import StepInput, StepOutput
from tests.stages import Chunk, make_step

TIMEOUT_S = 30.0


@pytest.fixture(autouse=True)
def frequent_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "_HEARTBEAT_S", 0.05)
    monkeypatch.setattr(pipeline_module, "_IDLE_HEARTBEAT_S", 0.05)


class Stages:
    """A `StageGroup` whose two stages answer when they are told to."""

    def __init__(self) -> None:
        self.ranks = [[None], [None]]
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def check_health(self) -> None:
        self.asked.set()
        await self.may_answer.wait()


class Messages:
    """A `Transport` with the outputs of a test."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[StepOutput] = asyncio.Queue()

    async def open(self, epoch: int) -> None:
        pass

    async def submit(self, step: StepInput) -> None:
        pass

    async def receive(self) -> StepOutput:
        return await self.outputs.get()

    async def close(self) -> None:
        pass


def make_pipeline(stages: Stages, messages: Messages, *, step_timeout_s: float = TIMEOUT_S) -> ActorPipeline:
    return ActorPipeline(cast(StageGroup, stages), messages, step_timeout_s=step_timeout_s)


async def test_a_step_that_comes_while_stages_are_slow_to_answer_is_taken_at_once():
    stages, messages = Stages(), Messages()
    pipeline = make_pipeline(stages, messages)
    await pipeline.submit(make_step(Chunk(token_ids=[1], block_ids=[0])))
    receiving = asyncio.create_task(pipeline.receive())
    await stages.asked.wait()
    output = StepOutput(step_id=0, epoch=0, token_ids=np.zeros(1, np.int32))
    messages.outputs.put_nowait(output)

    # The stages are never told to answer.
    assert await asyncio.wait_for(receiving, TIMEOUT_S) is output


async def test_a_step_that_takes_too_long_counts_from_when_it_went_in():
    stages, messages = Stages(), Messages()
    stages.may_answer.set()
    pipeline = make_pipeline(stages, messages, step_timeout_s=0.2)
    receiving = asyncio.create_task(pipeline.receive())
    await asyncio.sleep(0.5)  # without a step, nothing is late
    await pipeline.submit(make_step(Chunk(token_ids=[1], block_ids=[0])))

    with pytest.raises(PipelineFaultError, match=r"longer than step_timeout_s=0\.2; all stages answer") as caught:
        await asyncio.wait_for(receiving, TIMEOUT_S)
    assert (caught.value.reason, caught.value.stages) == ("hung", {0, 1})
