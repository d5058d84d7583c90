"""Pipelines by every transport: overlap, order, faults of one step, death."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from rayserve_sarathi.actors.pipeline import ActorPipeline
from rayserve_sarathi.actors.stage_group import StageGroup
from rayserve_sarathi.actors.transport import TRANSPORTS, Transport
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError, PipelineFaultError
from rayserve_sarathi.execution.inline import make_inline_pipeline
from rayserve_sarathi.placement import stage_bundle
from rayserve_sarathi.registry import load
from rayserve_sarathi.request import Request, SamplingParams
from rayserve_sarathi.step import StepInput, StepOutput
from tests.actors.cluster import ray_environment
from tests.factories import make_scheduler
from tests.servable import save_servable

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough that computing a step takes much longer than sending it.
    return save_servable(tmp_path_factory.mktemp("servable"), num_layers=4, hidden_size=512)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_environment() as environment, mock.patch.dict(os.environ, environment):
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            yield
        finally:
            ray.shutdown()


def make_config(checkpoint: Path, **settings: object) -> EngineConfig:
    shape = {"pipeline_parallel_size": 2, "max_model_len": 256, "heartbeat_timeout_s": 3.0, **settings}
    return EngineConfig(model=str(checkpoint), device="cpu", **shape)  # type: ignore[arg-type]


@asynccontextmanager
async def started(config: EngineConfig, transport: str = "compiled_graph") -> AsyncIterator[ActorPipeline]:
    if transport == "inline":
        inline, _ = make_inline_pipeline(config)
        yield inline  # type: ignore[misc]  # of what the tests use it has all but `pids`
        await inline.close()
        return
    group = placement_group([stage_bundle(config)] * config.pipeline_parallel_size)
    try:
        stages = StageGroup(config, placement_group=group, first_bundle=0)
        await stages.start()
        way: Transport = load("transport", transport, TRANSPORTS)(
            stages, config, max_steps_inside=3, max_message_bytes=1 << 22
        )
        pipeline = ActorPipeline(stages, way, step_timeout_s=config.step_timeout_s)
        await pipeline.open()
        try:
            yield pipeline
        finally:
            await pipeline.close()
    finally:
        remove_placement_group(group)


def make_steps(num_steps: int, *, first: int = 0, epoch: int = 0, num_tokens: int = 64) -> list[StepInput]:
    """Return the first steps of one long prompt, a chunk each, numbered from `first`."""
    scheduler = make_scheduler(block_size=16, num_blocks=16, token_budget=num_tokens, max_steps_in_flight=num_steps)
    scheduler.add(Request("long", list(range(1, num_steps * num_tokens + 1)), SamplingParams(max_tokens=1)))
    steps = [scheduler.schedule(0.0) for _ in range(num_steps)]
    return [replace(step, step_id=step.step_id + first, epoch=epoch) for step in steps if step is not None]


async def run(pipeline: ActorPipeline, steps: list[StepInput]) -> list[StepOutput]:
    async with asyncio.timeout(60):
        for step in steps:
            await pipeline.submit(step)
        return [await pipeline.receive() for _ in steps]


@pytest.mark.parametrize("transport", ["inline", *sorted(TRANSPORTS)])
async def test_a_step_that_a_stage_cannot_compute_fails_alone(wide_checkpoint: Path, transport: str):
    bad, good = make_steps(1)[0], make_steps(1, first=1)[0]
    bad = replace(bad, token_ids=bad.token_ids + 1_000_000)  # outside of the embedding
    async with started(make_config(wide_checkpoint), transport) as pipeline:
        outputs = await run(pipeline, [bad, good])

    assert [output.step_id for output in outputs] == [0, 1]
    assert outputs[0].fault is not None
    assert "stage 0 failed" in outputs[0].fault.message
    assert len(outputs[0].timings) == 2
    assert outputs[1].fault is None
    assert outputs[1].token_ids.shape == (1,)


async def test_all_transports_give_the_same_tokens(wide_checkpoint: Path):
    token_ids = {}
    for transport in ("inline", *TRANSPORTS):
        for tp_size in (1, 2):
            config = make_config(wide_checkpoint, tensor_parallel_size=tp_size)
            async with started(config, transport) as pipeline:
                outputs = await run(pipeline, make_steps(3))
            assert [output.step_id for output in outputs] == [0, 1, 2]
            token_ids[transport, tp_size] = outputs[-1].token_ids.tolist()

    assert len(set(map(tuple, token_ids.values()))) == 1, token_ids


@pytest.mark.parametrize("transport", sorted(TRANSPORTS))
class TestTransports:
    """What a pipeline of stage actors does, whatever way its messages take, and one in a single process cannot."""

    async def test_stages_work_on_different_steps_at_the_same_time(self, wide_checkpoint: Path, transport: str):
        async with started(make_config(wide_checkpoint), transport) as pipeline:
            await run(pipeline, make_steps(1))
            outputs = await run(pipeline, make_steps(3, first=1))

        assert [output.step_id for output in outputs] == [1, 2, 3]
        for earlier, later in itertools.pairwise(outputs):
            # Stage 0 begins the next step before stage 1 has ended this one.
            assert later.timings[0].start_s < earlier.timings[1].end_s
        for output in outputs:
            first, second = output.timings
            assert (first.stage, second.stage) == (0, 1)
            assert first.receive_s <= first.start_s < first.end_s <= second.receive_s <= second.start_s < second.end_s

    @pytest.mark.parametrize(("what", "reason"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "hung")])
    async def test_a_lost_stage_is_named_and_replaced(
        self, wide_checkpoint: Path, transport: str, what: signal.Signals, reason: str
    ):
        async with started(make_config(wide_checkpoint), transport) as pipeline:
            (before,) = await run(pipeline, make_steps(1))
            await pipeline.check_health()
            os.kill((await pipeline.pids())[1], what)
            with pytest.raises(PipelineFaultError, match="stage 1 ") as caught:
                await run(pipeline, make_steps(1, first=1))
            assert (caught.value.reason, caught.value.stages) == (reason, {1})
            with pytest.raises(PipelineFaultError, match="stage 1 "):
                await pipeline.check_health()

            await pipeline.rebuild(caught.value.stages)
            await pipeline.check_health()
            (after,) = await run(pipeline, make_steps(1, first=2, epoch=1))

        assert after.token_ids.tolist() == before.token_ids.tolist()

    async def test_a_lost_rank_costs_all_ranks_and_no_tokens(self, wide_checkpoint: Path, transport: str):
        async with started(make_config(wide_checkpoint, tensor_parallel_size=2), transport) as pipeline:
            before = await run(pipeline, make_steps(3))
            os.kill((await pipeline.pids())[3], signal.SIGKILL)
            with pytest.raises(PipelineFaultError, match="stage 1") as caught:
                await run(pipeline, make_steps(3, first=3))
            await pipeline.rebuild(caught.value.stages)
            after = await run(pipeline, make_steps(3, first=9, epoch=1))

        assert after[-1].token_ids.tolist() == before[-1].token_ids.tolist()


async def test_outputs_outlive_the_buffers_they_came_in(wide_checkpoint: Path):
    async with started(make_config(wide_checkpoint), "compiled_graph") as pipeline:
        kept = []
        for step in make_steps(7, num_tokens=32):  # more than the graph has buffers
            kept += await run(pipeline, [step])

    assert [output.step_id for output in kept] == list(range(7))
    for output in kept:
        output.token_ids.fill(-1)  # it would be read-only in a buffer of Ray's, and gone after Ray's shutdown


async def test_an_idle_graph_rests_and_comes_back(wide_checkpoint: Path):
    async with started(make_config(wide_checkpoint), "compiled_graph") as pipeline:
        first = await run(pipeline, make_steps(1))
        waiting = asyncio.ensure_future(pipeline.receive())
        await asyncio.sleep(7)  # longer than the graph stays without steps; there is no event for it
        begin = [process_cpu_s(pid) for pid in await pipeline.pids()]
        await asyncio.sleep(2)
        idle = [process_cpu_s(pid) - cpu_s for pid, cpu_s in zip(await pipeline.pids(), begin, strict=True)]
        (step,) = make_steps(1)
        await pipeline.submit(step)
        second = await asyncio.wait_for(waiting, 60)

    assert max(idle) < 0.5
    assert second.token_ids.tolist() == first[0].token_ids.tolist()


def process_cpu_s(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_a_setting_that_no_stage_can_meet_is_said_as_such(wide_checkpoint: Path):
    with pytest.raises(ConfigError, match="room for 16 tokens"):
        async with started(make_config(wide_checkpoint, num_gpu_blocks_override=1)):
            pass
