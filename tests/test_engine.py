"""The loop of scheduler and pipeline, with a pipeline that does what a test tells it to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from rayserve_sarathi.engine import LocalEngine
from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams
from rayserve_sarathi.step import StepInput, StepOutput
from tests.factories import HashModel, expected, make_scheduler

PROMPT = [1, 2, 3, 4, 5]


class ScriptedPipeline:
    """Computes with `HashModel`; can be told to hold steps back, to fail them, or to die."""

    def __init__(self) -> None:
        self._model = HashModel(num_blocks=64, block_size=4)
        self._inside: asyncio.Queue[StepInput] = asyncio.Queue()
        self.may_return = asyncio.Event()
        self.may_return.set()
        self._num_submitted = 0
        self._submitted = asyncio.Condition()
        self.num_failing = 0
        self.is_dead = False
        self.is_closed = False

    async def submit(self, step: StepInput) -> None:
        self._inside.put_nowait(step)
        async with self._submitted:
            self._num_submitted += 1
            self._submitted.notify_all()

    async def wait_until_submitted(self, num_steps: int) -> None:
        async with asyncio.timeout(10), self._submitted:
            await self._submitted.wait_for(lambda: self._num_submitted >= num_steps)

    async def receive(self) -> StepOutput:
        step = await self._inside.get()
        await self.may_return.wait()
        if self.is_dead:
            raise EngineDeadError("stage 0 is dead")
        if self.num_failing:
            self.num_failing -= 1
            return StepOutput(step_id=step.step_id, epoch=0, token_ids=np.empty(0, np.int32), error="stage 0 failed")
        return self._model.run(step)

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDeadError("stage 0 is dead")

    async def close(self) -> None:
        self.is_closed = True


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[tuple[LocalEngine, ScriptedPipeline]]:
    pipeline = ScriptedPipeline()
    scheduler = make_scheduler(**settings)  # type: ignore[arg-type]
    async with LocalEngine(scheduler, pipeline, eos_token_ids=(), model_name="m") as engine:
        yield engine, pipeline


async def collect(engine: LocalEngine, request_id: str, *, max_tokens: int = 6) -> list[RequestOutput]:
    return [output async for output in engine.generate(request_id, PROMPT, SamplingParams(max_tokens=max_tokens))]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


async def test_a_request_gets_its_tokens_and_a_reason():
    async with running() as (engine, pipeline):
        outputs = await collect(engine, "a")

    assert tokens_of(outputs) == expected(PROMPT, 6)
    assert [output.finish_reason for output in outputs] == [None] * 5 + [FinishReason.LENGTH]
    assert pipeline.is_closed


async def test_a_request_that_comes_while_a_step_is_out_is_submitted_at_once():
    async with running(max_steps_in_flight=2) as (engine, pipeline):
        pipeline.may_return.clear()
        first = asyncio.create_task(collect(engine, "first"))
        await pipeline.wait_until_submitted(1)
        second = asyncio.create_task(collect(engine, "second"))
        await pipeline.wait_until_submitted(2)
        pipeline.may_return.set()

        assert tokens_of(await first) == tokens_of(await second) == expected(PROMPT, 6)


async def test_leaving_a_stream_aborts_its_request():
    async with running() as (engine, _):
        stream = engine.generate("a", PROMPT, SamplingParams(max_tokens=200))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator
        metrics = await engine.metrics()

    assert 'sarathi_request_success_total{finished_reason="abort",model_name="m",pipeline="0"} 1.0' in metrics
    assert 'sarathi_num_requests_running{model_name="m",pipeline="0"} 0.0' in metrics


async def test_finishing_a_request_ends_it_as_stopped():
    async with running() as (engine, _):
        stream = engine.generate("a", PROMPT, SamplingParams(max_tokens=200))
        await anext(stream)
        engine.finish("a")
        await stream.aclose()  # type: ignore[attr-defined]  # an async generator
        metrics = await engine.metrics()

    assert 'sarathi_request_success_total{finished_reason="stop",model_name="m",pipeline="0"} 1.0' in metrics
    assert 'finished_reason="abort"' not in metrics


async def test_a_failed_step_ends_its_request_and_the_engine_goes_on():
    async with running() as (engine, pipeline):
        pipeline.num_failing = 1
        failed = await collect(engine, "failed")
        fine = await collect(engine, "fine")

    assert [(output.finish_reason, output.error) for output in failed] == [(FinishReason.ERROR, "stage 0 failed")]
    assert tokens_of(fine) == expected(PROMPT, 6)


async def test_many_failed_steps_in_a_row_mean_that_the_pipeline_is_broken():
    async with running() as (engine, pipeline):
        pipeline.num_failing = 100
        for index in range(8):
            await collect(engine, f"request-{index}")
        with pytest.raises(EngineDeadError, match="8 steps in a row failed"):
            await collect(engine, "next")
        with pytest.raises(EngineDeadError):
            await engine.check_ready()


async def test_a_dead_pipeline_ends_every_open_request_and_refuses_new_ones():
    async with running(max_num_seqs=1) as (engine, pipeline):
        pipeline.may_return.clear()
        open_requests = [asyncio.create_task(collect(engine, name)) for name in ("running", "waiting")]
        await pipeline.wait_until_submitted(1)
        pipeline.is_dead = True
        pipeline.may_return.set()
        for outputs in await asyncio.gather(*open_requests):
            assert [(output.finish_reason, output.error) for output in outputs] == [
                (FinishReason.ERROR, "stage 0 is dead")
            ]
        with pytest.raises(EngineDeadError, match="stage 0 is dead"):
            await collect(engine, "late")


async def test_stopping_the_engine_ends_open_requests():
    async with running() as (engine, pipeline):
        pipeline.may_return.clear()
        waiting = asyncio.create_task(collect(engine, "a"))
        await pipeline.wait_until_submitted(1)

    assert [output.finish_reason for output in await waiting] == [FinishReason.ERROR]
