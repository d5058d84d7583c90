"""The load that ended the reference implementation in assertions (sarathi-serve's issue 41), on four real stages."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from rayserve_sarathi.config import EngineConfig, SchedulerConfig
from rayserve_sarathi.engine import make_scheduler
from rayserve_sarathi.execution.stage import Stage
from rayserve_sarathi.local_engine import LocalEngine
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.scheduling.build import max_steps_in_flight
from tests.execution.wired import wired
from tests.servable import Reference, save_servable

NUM_STAGES = 4
NUM_BLOCKS = 40  # 160 tokens for requests of up to 68
NUM_REQUESTS = 64
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("servable"))


async def test_everything_at_once_on_four_stages_with_preemption_and_aborts(checkpoint: Path):
    config = EngineConfig(
        model=str(checkpoint),
        device="cpu",
        pipeline_parallel_size=NUM_STAGES,
        max_model_len=96,
        block_size=4,
        scheduler=SchedulerConfig(token_budget=24, max_num_partial_prefills=2),
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 300, rng.integers(1, 45)).tolist() for _ in range(NUM_REQUESTS)]
    leave_after = {index: int(rng.integers(0, 12)) for index in range(1, NUM_REQUESTS, 3)}
    # Whatever they do when so many tokens have come for all: wait, prefill, decode, or wait again after preemption.
    leave_at = {int(index): 20 * turn + 5 for turn, index in enumerate(rng.permutation(range(2, NUM_REQUESTS, 6)))}
    reference = Reference(checkpoint)
    info = resolve_model(config)
    stages = [Stage(config, index=index) for index in range(NUM_STAGES)]
    for stage in stages:
        stage.load()
        stage.start(NUM_BLOCKS)
    scheduler = make_scheduler(config, info, num_blocks=NUM_BLOCKS)
    tokens: list[list[int]] = [[] for _ in prompts]
    most_in_flight = 0

    async def run(engine: LocalEngine, index: int) -> None:
        nonlocal most_in_flight
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        async with aclosing(engine.generate(f"request-{index}", prompts[index], sampling)) as outputs:  # type: ignore[type-var]  # it is an async generator
            async for output in outputs:
                tokens[index] += output.token_ids
                most_in_flight = max(most_in_flight, scheduler.state().num_steps_in_flight)
                num_tokens = sum(map(len, tokens))
                for leaving in [leaving for leaving, after in leave_at.items() if after <= num_tokens]:
                    tasks[leaving].cancel()
                    del leave_at[leaving]
                if len(tokens[index]) > leave_after.get(index, MAX_TOKENS):
                    break

    async with wired(stages) as pipeline:
        local = LocalEngine(scheduler, pipeline.endpoint, eos_token_ids=info.eos_token_ids, model_name="m")  # type: ignore[arg-type]  # an endpoint rebuilds nothing
        async with local as engine, asyncio.timeout(120):
            tasks = [asyncio.create_task(run(engine, index)) for index in range(NUM_REQUESTS)]
            results = await asyncio.gather(*tasks, return_exceptions=True)
            while scheduler.has_unfinished_requests:  # noqa: ASYNC110  # the last steps return without an event
                await asyncio.sleep(0.01)

    assert not leave_at
    cancelled = {index for index, result in enumerate(results) if isinstance(result, asyncio.CancelledError)}
    assert cancelled
    assert all(result is None for index, result in enumerate(results) if index not in cancelled)
    assert scheduler.metrics.num_preemptions > 0
    assert most_in_flight == max_steps_in_flight(NUM_STAGES) == NUM_STAGES + 1
    assert scheduler.state().kv_cache_usage == 0
    scheduler.check_integrity()
    for index, generated in enumerate(tokens):
        expected = reference.generate(prompts[index], MAX_TOKENS)
        is_whole = index not in leave_after and index not in cancelled
        assert generated == (expected if is_whole else expected[: len(generated)]), index
