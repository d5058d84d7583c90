"""The load that ended the reference implementation in assertions (sarathi-serve's issue 41), on four real stages."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from rayserve_sarathi.config import EngineConfig, SchedulerConfig
from rayserve_sarathi.engine import make_scheduler
from rayserve_sarathi.execution.inline import make_inline_pipeline
from rayserve_sarathi.local_engine import LocalEngine
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.request import SamplingParams
from tests.servable import Reference, save_servable

NUM_REQUESTS = 64
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("servable"))


async def test_everything_at_once_on_four_stages_with_preemption_and_aborts(checkpoint: Path):
    config = EngineConfig(
        model=str(checkpoint),
        device="cpu",
        transport="inline",
        pipeline_parallel_size=4,
        max_model_len=96,
        block_size=4,
        num_gpu_blocks_override=40,  # 160 tokens for requests of up to 68
        scheduler=SchedulerConfig(token_budget=24, max_num_partial_prefills=2),
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 300, rng.integers(1, 45)).tolist() for _ in range(NUM_REQUESTS)]
    leave_after = {index: int(rng.integers(0, 12)) for index in range(1, NUM_REQUESTS, 3)}
    reference = Reference(checkpoint)
    info = resolve_model(config)
    pipeline, num_blocks = make_inline_pipeline(config)
    scheduler = make_scheduler(config, info, num_blocks=num_blocks)

    async def run(engine: LocalEngine, index: int) -> list[int]:
        tokens: list[int] = []
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
        async with aclosing(engine.generate(f"request-{index}", prompts[index], sampling)) as outputs:  # type: ignore[type-var]  # it is an async generator
            async for output in outputs:
                tokens += output.token_ids
                if len(tokens) > leave_after.get(index, MAX_TOKENS):
                    break
        return tokens

    async with LocalEngine(scheduler, pipeline, eos_token_ids=info.eos_token_ids, model_name="m") as engine:
        async with asyncio.timeout(120):
            outputs = await asyncio.gather(*(run(engine, index) for index in range(NUM_REQUESTS)))
            while scheduler.has_unfinished_requests:  # noqa: ASYNC110  # the last steps return without an event
                await asyncio.sleep(0.01)

    assert scheduler.metrics.num_preemptions > 0
    assert scheduler.state().kv_cache_usage == 0
    scheduler.check_integrity()
    for index, tokens in enumerate(outputs):
        expected = reference.generate(prompts[index], MAX_TOKENS)
        assert tokens == (expected[: len(tokens)] if index in leave_after else expected), index
