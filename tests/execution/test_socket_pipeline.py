"""Stages joined by sockets: the inline pipeline's tokens, overlap, faults of a step, death, lost messages."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rayserve_sarathi.engine import Engine, RebuildLimit
from rayserve_sarathi.errors import PipelineFaultError
from rayserve_sarathi.execution.inline import InlinePipeline
from rayserve_sarathi.request import RequestOutput, SamplingParams
from tests.execution.relays import DeviceRelay, LastRelay, Relay, VerboseRelay, make_step
from tests.execution.wired import TIMEOUT_S, make_stages, make_steps, wired
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
