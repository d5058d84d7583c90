"""The loop of scheduler and pipeline, with a pipeline that does what a test tells it to."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rayserve_sarathi.engine import Engine, RebuildLimit
from rayserve_sarathi.errors import EngineDeadError, PipelineFaultError
from rayserve_sarathi.local_engine import LocalEngine, Mailboxes
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams
from rayserve_sarathi.scheduling.ahead import AHEAD_S
from rayserve_sarathi.step import StepFault, StepOutput
from tests.factories import expected, make_scheduler
from tests.scripted_pipeline import ScriptedPipeline

PROMPT = [1, 2, 3, 4, 5]


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[tuple[LocalEngine, ScriptedPipeline]]:
    pipeline = ScriptedPipeline()
    scheduler = make_scheduler(**settings)  # type: ignore[arg-type]
    async with LocalEngine(scheduler, pipeline, eos_token_ids=(), model_name="m") as engine:
        yield engine, pipeline


class Supervised:
    """An engine whose pipeline may be rebuilt, and the outputs of its requests."""

    def __init__(self, *, max_rebuilds: int = 3, window_s: float = 1000.0, report_period_s: float = 10.0) -> None:
        self.pipeline = ScriptedPipeline()
        self.scheduler = make_scheduler()
        self.boxes = Mailboxes()
        limit = RebuildLimit(max_rebuilds, window_s=window_s)
        self.engine = Engine(
            self.scheduler,
            self.pipeline,
            deliver=self.boxes.deliver,
            rebuild_limit=limit,
            report_period_s=report_period_s,
        )
        self.run = asyncio.create_task(self.engine.run())

    async def __aenter__(self) -> "Supervised":
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.run.cancel()
        await asyncio.gather(self.run, return_exceptions=True)

    def start(self, request_id: str, *, max_tokens: int = 6) -> "asyncio.Task[list[RequestOutput]]":
        self.boxes.open(request_id)
        self.engine.add(request_id, PROMPT, SamplingParams(max_tokens=max_tokens))
        return asyncio.create_task(self._collect(request_id))

    async def _collect(self, request_id: str) -> list[RequestOutput]:
        async with asyncio.timeout(10):
            return [output async for output in self.boxes.read(request_id)]


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


async def test_the_step_after_a_long_one_is_submitted_before_that_comes_back():
    async with running(is_async=True) as (engine, pipeline):
        pipeline.may_return.clear()
        first = asyncio.create_task(collect(engine, "first", max_tokens=1))
        await pipeline.wait_until_submitted(1)
        await asyncio.sleep(2 * AHEAD_S)  # so long steps take here, as far as is known
        pipeline.may_return.set()
        await first
        pipeline.may_return.clear()
        second = asyncio.create_task(collect(engine, "second", max_tokens=2))
        await pipeline.wait_until_submitted(3)
        pipeline.may_return.set()

        assert tokens_of(await second) == expected(PROMPT, 2)


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

    assert [(output.finish_reason, output.error) for output in failed] == [(FinishReason.ERROR, "stage 1 failed")]
    assert tokens_of(fine) == expected(PROMPT, 6)


async def test_many_failed_steps_in_a_row_mean_that_their_stage_is_broken():
    async with Supervised() as supervised:
        supervised.pipeline.num_failing = 8
        failed = [await supervised.start(f"request-{index}") for index in range(8)]
        fine = await supervised.start("next")

    assert [outputs[-1].finish_reason for outputs in failed] == [FinishReason.ERROR] * 8
    assert supervised.pipeline.rebuilds == [{1}]
    assert supervised.scheduler.metrics.num_stage_restarts == {"failed": 1}
    assert tokens_of(fine) == expected(PROMPT, 6)


@pytest.mark.parametrize("is_dead", [True, False])
async def test_a_rank_that_lost_another_fails_the_step_unless_that_one_died(is_dead: bool):
    async with Supervised() as supervised:
        pipeline = supervised.pipeline
        pipeline.step_fault = StepFault(message="lost a rank", stage=1, is_stage_broken=True, is_consequence=True)
        pipeline.num_failing = 1
        if is_dead:
            pipeline.lost = PipelineFaultError("stage 1, rank 1, is dead", reason="died", stages=[1])
        outputs = await supervised.start("request")
        await pipeline.is_rebuilding.wait()

    assert pipeline.rebuilds == [{1}]
    if is_dead:
        assert tokens_of(outputs) == expected(PROMPT, 6)
    else:
        assert [(output.finish_reason, output.error) for output in outputs] == [(FinishReason.ERROR, "lost a rank")]


async def test_streams_go_on_with_the_same_tokens_after_a_fault():
    async with Supervised() as supervised:
        streams = [supervised.start(f"request-{index}", max_tokens=40) for index in range(3)]
        await supervised.pipeline.wait_until_submitted(10)
        supervised.pipeline.fault = PipelineFaultError("stage 1 is dead", reason="died", stages=[1])
        outputs = await asyncio.gather(*streams)

    assert [tokens_of(each) for each in outputs] == [expected(PROMPT, 40)] * 3
    assert supervised.pipeline.rebuilds == [{1}]
    assert supervised.scheduler.metrics.num_stage_restarts == {"died": 1}
    assert supervised.scheduler.metrics.num_recomputed_tokens > 0


async def test_a_fault_during_recovery_is_another_one_to_recover_from():
    async with Supervised() as supervised:
        supervised.pipeline.rebuild_faults = [PipelineFaultError("stage 0 is dead", reason="died", stages=[0])]
        supervised.pipeline.fault = PipelineFaultError("stage 1 hangs", reason="hung", stages=[1])
        outputs = await supervised.start("a")

    assert tokens_of(outputs) == expected(PROMPT, 6)
    assert supervised.pipeline.rebuilds == [{1}, {0, 1}]
    assert supervised.scheduler.metrics.num_stage_restarts == {"hung": 1, "died": 1}


async def test_while_it_is_rebuilt_the_engine_is_alive_takes_requests_and_is_not_ready():
    async with Supervised() as supervised:
        supervised.pipeline.may_rebuild.clear()
        supervised.pipeline.fault = PipelineFaultError("stage 1 is dead", reason="died")
        before = supervised.start("before")
        await supervised.pipeline.is_rebuilding.wait()
        supervised.engine.check_alive()
        with pytest.raises(EngineDeadError, match="being rebuilt"):
            await supervised.engine.check_ready()
        after = supervised.start("after")
        supervised.pipeline.may_rebuild.set()

        assert tokens_of(await before) == tokens_of(await after) == expected(PROMPT, 6)
        await supervised.engine.check_ready()


async def test_a_pipeline_that_fails_too_often_is_given_up():
    async with Supervised(max_rebuilds=2) as supervised:
        faults: list[Exception] = [PipelineFaultError(f"fault {index}", reason="died") for index in range(9)]
        supervised.pipeline.rebuild_faults = faults
        supervised.pipeline.fault = PipelineFaultError("stage 1 is dead", reason="died")
        outputs = await supervised.start("a")

        assert len(supervised.pipeline.rebuilds) == 2
        assert (outputs[-1].finish_reason, outputs[-1].error) == (
            FinishReason.LOST,
            "the pipeline is given up: fault 7",
        )
        with pytest.raises(EngineDeadError, match="given up"):
            supervised.engine.check_alive()
        with pytest.raises(EngineDeadError, match="given up"):
            supervised.start("late")
        with pytest.raises(EngineDeadError, match="given up"):
            await supervised.run
    metrics = supervised.scheduler.metrics
    assert metrics.num_started == sum(metrics.num_finished.values()) == 1


async def test_a_pipeline_whose_attempts_take_long_is_given_up_too():
    # Each attempt outlasts the window, so that there are never two within it.
    async with Supervised(max_rebuilds=1, window_s=0.0) as supervised:
        supervised.pipeline.rebuild_faults = [PipelineFaultError("no room", reason="died") for _ in range(9)]
        supervised.pipeline.fault = PipelineFaultError("stage 1 is dead", reason="died")
        outputs = await supervised.start("a")

    assert outputs[-1].finish_reason is FinishReason.LOST
    assert len(supervised.pipeline.rebuilds) < 9


def test_rebuilds_count_within_their_window_only():
    limit = RebuildLimit(2, window_s=10.0)

    assert [limit.count(now_s) for now_s in (0.0, 1.0, 2.0, 13.0, 14.0, 15.0)] == [True, True, False, True, True, False]


async def test_a_dead_pipeline_in_the_same_process_ends_every_open_request_and_refuses_new_ones():
    async with running(max_num_seqs=1) as (engine, pipeline):
        pipeline.may_return.clear()
        open_requests = [asyncio.create_task(collect(engine, name)) for name in ("running", "waiting")]
        await pipeline.wait_until_submitted(1)
        pipeline.fault = PipelineFaultError("a step took too long", reason="hung")
        pipeline.may_return.set()
        for outcome in await asyncio.gather(*open_requests, return_exceptions=True):
            assert isinstance(outcome, EngineDeadError)
            assert "a step took too long" in str(outcome)
        with pytest.raises(EngineDeadError, match="a step took too long"):
            await collect(engine, "late")


async def test_metrics_say_what_each_stage_did():
    async with running() as (engine, _):
        before = await engine.metrics()
        await collect(engine, "a")
        metrics = await engine.metrics()

    assert "sarathi_step_time_seconds_total{" not in before
    for stage in ("0", "1"):
        for kind in ("busy", "bubble", "comm"):
            labels = f'kind="{kind}",model_name="m",pipeline="0",stage="{stage}"'
            assert f"sarathi_step_time_seconds_total{{{labels}}} " in metrics
        assert f'sarathi_bubble_share{{model_name="m",pipeline="0",stage="{stage}"}} ' in metrics


async def test_a_trace_has_every_step_before_and_after_a_fault():
    async with Supervised() as supervised:
        stream = supervised.start("a", max_tokens=40)
        await supervised.pipeline.wait_until_submitted(10)
        supervised.pipeline.fault = PipelineFaultError("stage 1 is dead", reason="died", stages=[1])
        await stream
        trace = supervised.engine.trace(pipeline="p")

    assert trace.pipeline == "p"
    assert {record.epoch for record in trace.records} == {0, 1}
    assert all(record.submit_s <= record.back_s <= trace.now_s for record in trace.records)
    # One prefill in each epoch, one token of the output in each step.
    assert len(trace.records) == 40
    assert [record.num_prefill_tokens > 0 for record in trace.records].count(True) == 2
    assert {record.request_ids for record in trace.records} == {("a",)}


async def test_a_line_in_the_log_says_what_runs(caplog):
    with caplog.at_level(logging.INFO, logger="rayserve_sarathi.engine"):
        async with Supervised(report_period_s=0.001) as supervised:
            await supervised.start("a", max_tokens=40)
            await asyncio.sleep(0.01)  # the line comes by itself: there is no event to wait for
            (line, *_) = [record.getMessage() for record in caplog.records]
            caplog.clear()
            await asyncio.sleep(0.01)

    pattern = (
        r"running \d, waiting \d, prompt [\d.]+ tokens/s, generation [\d.]+ tokens/s, "
        r"KV cache [\d.]+%, steps in flight \d, bubbles ([\d.]+%, [\d.]+%|unknown)"
    )
    assert re.fullmatch(pattern, line), line
    assert not caplog.records, "it says something though nothing runs"


async def test_stopping_the_engine_ends_open_requests():
    async with running() as (engine, pipeline):
        pipeline.may_return.clear()
        waiting = asyncio.create_task(collect(engine, "a"))
        await pipeline.wait_until_submitted(1)

    with pytest.raises(EngineDeadError, match="the engine was stopped"):
        await waiting


async def test_a_fault_while_it_is_stopped_starts_no_recovery():
    async with Supervised() as engine:
        receive = engine.pipeline.receive

        async def break_when_cancelled() -> StepOutput:
            try:
                return await receive()
            except asyncio.CancelledError:
                raise PipelineFaultError("a connection broke", reason="died") from None

        engine.pipeline.receive = break_when_cancelled
        engine.pipeline.may_return.clear()
        waiting = engine.start("a")
        await engine.pipeline.wait_until_submitted(1)
        engine.run.cancel()
        await asyncio.wait((engine.run,), timeout=10)

        assert engine.run.cancelled() and not engine.pipeline.rebuilds
        assert (await waiting)[-1].finish_reason is FinishReason.LOST
