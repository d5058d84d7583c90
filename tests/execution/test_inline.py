"""A stage of this process: its steps come back in order, whether the event loop waits for them or a thread does."""

import shutil
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.execution.inline import InlinePipeline
from rayserve_sarathi.execution.stage import LaunchedStep, Stage, StageMessage
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import StepInput
from tests.execution.wired import TIMEOUT_S, make_stages
from tests.servable import save_servable
from tests.stages import Chunk, make_step

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="without a compiler a thread waits for all steps"
)

PLAIN = SamplingParams(temperature=0)
NEEDS_LOGITS = SamplingParams(temperature=0, logprobs=1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    (stage,) = make_stages(save_servable(tmp_path_factory.mktemp("servable"), hidden_size=64), num_stages=1)
    return stage


def steps_of(*all_sampling: SamplingParams) -> Iterator[StepInput]:
    for step_id, sampling in enumerate(all_sampling):
        yield make_step(Chunk(token_ids=[5, 6, step_id], block_ids=[step_id], sampling=sampling), step_id=step_id)


async def test_no_thread_waits_for_what_the_kernels_compute(stage: Stage) -> None:
    before = set(threading.enumerate())
    pipeline = InlinePipeline([[stage]], step_timeout_s=TIMEOUT_S)
    for step in steps_of(PLAIN, PLAIN, PLAIN):
        await pipeline.submit(step)
    outputs = [await pipeline.receive() for _ in range(3)]

    assert [output.step_id for output in outputs] == [0, 1, 2]
    assert set(threading.enumerate()) <= before
    await pipeline.close()


async def test_steps_that_wait_in_different_ways_come_back_in_order(stage: Stage) -> None:
    pipeline = InlinePipeline([[stage]], step_timeout_s=TIMEOUT_S)
    tokens = []
    for sampling in ([PLAIN] * 6, [PLAIN, NEEDS_LOGITS, NEEDS_LOGITS, PLAIN, PLAIN, NEEDS_LOGITS]):
        for step in steps_of(*sampling):
            await pipeline.submit(step)
        time.sleep(0.02)  # noqa: ASYNC251  the loop is late, and whoever else waits for a step has it by now
        outputs = [await pipeline.receive() for _ in sampling]
        assert [output.step_id for output in outputs] == [*range(6)]
        times = [each for output in outputs for timing in output.timings for each in (timing.start_s, timing.end_s)]
        assert times == sorted(times), "they begin and end one after the other"
        assert [len(output.logprobs) for output in outputs] == [int(each is NEEDS_LOGITS) for each in sampling]
        tokens.append([output.token_ids.tolist() for output in outputs])

    assert tokens[0] == tokens[1]
    await pipeline.close()


async def test_a_step_that_takes_too_long_ends_the_pipeline(stage: Stage) -> None:
    long = Chunk(token_ids=[7] * 256, block_ids=[*range(16)], sampling=PLAIN)
    before = [stage.launch(StageMessage(step=make_step(long, step_id=step_id))) for step_id in range(40)]
    pipeline = InlinePipeline([[stage]], step_timeout_s=0.001)
    await pipeline.submit(make_step(long, step_id=40))

    with pytest.raises(EngineDeadError, match=r"a step took longer than step_timeout_s=0\.001"):
        await pipeline.receive()

    await pipeline.close()
    for launched in before:
        assert isinstance(launched, LaunchedStep)
        launched.wait()
