"""Stage actors behind a compiled graph: overlap, order, faults of one step, death."""

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

from rayserve_sarathi.actors.pipeline import CompiledGraphPipeline, Stages, stage_bundle, start_stages
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError, EngineDeadError
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
    return EngineConfig(model=str(checkpoint), device="cpu", pipeline_parallel_size=2, max_model_len=256, **settings)  # type: ignore[arg-type]


@asynccontextmanager
async def started(config: EngineConfig) -> AsyncIterator[tuple[CompiledGraphPipeline, Stages]]:
    group = placement_group([stage_bundle("cpu")] * config.pipeline_parallel_size)
    try:
        stages, _ = await start_stages(config, placement_group=group, first_bundle=0)
        pipeline = CompiledGraphPipeline(stages, config, max_steps_inside=3, buffer_size_bytes=1 << 22)
        try:
            yield pipeline, stages
        finally:
            await pipeline.close()
    finally:
        remove_placement_group(group)


def make_steps(num_steps: int, *, num_tokens: int = 64) -> list[StepInput]:
    """Return the first steps of one long prompt, a chunk each."""
    scheduler = make_scheduler(block_size=16, num_blocks=16, token_budget=num_tokens, max_steps_in_flight=num_steps)
    scheduler.add(Request("long", list(range(1, num_steps * num_tokens + 1)), SamplingParams(max_tokens=1)))
    steps = [scheduler.schedule(0.0) for _ in range(num_steps)]
    return [step for step in steps if step is not None]


async def run(pipeline: CompiledGraphPipeline, steps: list[StepInput]) -> list[StepOutput]:
    for step in steps:
        await pipeline.submit(step)
    return [await pipeline.receive() for _ in steps]


async def test_stages_work_on_different_steps_at_the_same_time(wide_checkpoint: Path):
    async with started(make_config(wide_checkpoint)) as (pipeline, _):
        await run(pipeline, make_steps(1))
        outputs = await run(pipeline, make_steps(3))

    assert [output.step_id for output in outputs] == [0, 1, 2]
    for earlier, later in itertools.pairwise(outputs):
        # Stage 0 begins the next step before stage 1 has ended this one.
        assert later.timings[0].start_s < earlier.timings[1].end_s
    for output in outputs:
        first, second = output.timings
        assert (first.stage, second.stage) == (0, 1)
        assert first.receive_s <= first.start_s < first.end_s <= second.receive_s <= second.start_s < second.end_s


async def test_a_step_that_a_stage_cannot_compute_fails_alone(wide_checkpoint: Path):
    good = make_steps(1)[0]
    bad = replace(good, token_ids=good.token_ids + 1_000_000)  # outside of the embedding
    async with started(make_config(wide_checkpoint)) as (pipeline, _):
        outputs = await run(pipeline, [bad, good])

    assert outputs[0].error is not None
    assert "stage 0 failed" in outputs[0].error
    assert len(outputs[0].timings) == 2
    assert outputs[1].error is None
    assert outputs[1].token_ids.shape == (1,)


async def test_a_killed_stage_is_named(wide_checkpoint: Path):
    async with started(make_config(wide_checkpoint)) as (pipeline, stages):
        await run(pipeline, make_steps(1))
        await pipeline.check_health()
        os.kill(await stages[1].pid.options(concurrency_group="control").remote(), signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="stage 1 is dead"):
            await asyncio.wait_for(run(pipeline, make_steps(1)), 60)
        with pytest.raises(EngineDeadError, match="stage 1 is dead"):
            await pipeline.check_health()


async def test_a_setting_that_no_stage_can_meet_is_said_as_such(wide_checkpoint: Path):
    with pytest.raises(ConfigError, match="room for 16 tokens"):
        async with started(make_config(wide_checkpoint, num_gpu_blocks_override=1)):
            pass
