"""What a pipeline of stage actors replaces, with stages on threads in the place of actors."""

import asyncio
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from rayserve_sarathi.actors.pipeline import ActorPipeline
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.stage import Stage, StageMessage
from rayserve_sarathi.models.parallel import join
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import StepInput, StepOutput
from tests.checkpoints import save_checkpoint
from tests.stages import Chunk, make_step

TIMEOUT_S = 60.0
NUM_BLOCKS = 32
PROMPT = [5, 9, 60, 33, 8, 21, 96, 40, 2, 77]


class Stages:
    """A `StageGroup` of this process."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.ranks: list[list[Stage]] = [self._load(stage) for stage in range(config.pipeline_parallel_size)]
        self.replaced: list[int] = []

    async def find_silent(self) -> dict[int, str]:
        return {}

    async def check_health(self) -> None:
        pass

    def end(self, stages: Collection[int]) -> None:
        for stage in stages:
            self.ranks[stage] = []

    async def replace(self, stages: Collection[int]) -> None:
        for stage in stages:
            self.ranks[stage] = await asyncio.to_thread(self._load, stage)
        self.replaced += stages

    def _load(self, index: int) -> list[Stage]:
        store, tp_size = HashStore(), self._config.tensor_parallel_size

        def load(tp_rank: int) -> Stage:
            tp = join(
                store,
                tp_rank=tp_rank,
                tp_size=tp_size,
                meeting_timeout_s=TIMEOUT_S,
                timeout_s=TIMEOUT_S,
                device=torch.device("cpu"),
            )
            stage = Stage(self._config, index=index, tp=tp)
            stage.load()
            stage.start(NUM_BLOCKS)
            return stage

        with ThreadPoolExecutor(tp_size) as threads:
            return list(threads.map(load, range(tp_size)))


class Threads:
    """A `Transport`: each rank has a thread, which passes what it computed to the same rank of the next stage."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._threads: list[ThreadPoolExecutor] = []
        self._inside: deque[Future[StepOutput]] = deque()
        self.parted: list[int] = []
        """The stages that were asked to part when it was last closed."""

    async def open(self, epoch: int) -> None:
        self._threads = [ThreadPoolExecutor(1) for _ in self._stages.ranks[0]]

    async def submit(self, step: StepInput) -> None:
        outputs = [thread.submit(self._run, rank, step) for rank, thread in enumerate(self._threads)]
        self._inside.append(outputs[0])

    async def receive(self) -> StepOutput:
        return await asyncio.wrap_future(self._inside.popleft())

    async def close(self) -> None:
        self.parted = [stage for stage, ranks in enumerate(self._stages.ranks) if ranks]
        for thread in self._threads:
            await asyncio.to_thread(thread.shutdown)

    def _run(self, rank: int, step: StepInput) -> StepOutput:
        message: StageMessage | StepOutput = StageMessage(step=step)
        for ranks in self._stages.ranks:
            assert isinstance(message, StageMessage)
            message = ranks[rank].execute(message)
        assert isinstance(message, StepOutput)
        return message


async def run_step(pipeline: ActorPipeline, step: StepInput) -> StepOutput:
    await pipeline.submit(step)
    return await asyncio.wait_for(pipeline.receive(), TIMEOUT_S)


@pytest.mark.parametrize(("tp_size", "replaced"), [(1, []), (2, [0, 1])])
async def test_after_a_fault_in_the_first_stage_the_next_step_goes_through_all(
    tmp_path: Path, tp_size: int, replaced: list[int]
):
    save_checkpoint(tmp_path, "llama")
    config = EngineConfig(
        model=str(tmp_path), device="cpu", block_size=4, pipeline_parallel_size=2, tensor_parallel_size=tp_size
    )
    good = make_step(Chunk(token_ids=PROMPT, block_ids=[0, 1, 2], sampling=SamplingParams(temperature=0)))
    bad = make_step(Chunk(token_ids=PROMPT, block_ids=[0, 1, NUM_BLOCKS], sampling=SamplingParams(temperature=0)))
    stages = Stages(config)
    transport = Threads(stages)
    pipeline = ActorPipeline(stages, transport, step_timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
    await pipeline.open()
    expected = await run_step(pipeline, good)

    fault = (await run_step(pipeline, bad)).fault
    assert fault is not None and fault.stage == 0
    broken = [fault.stage] if fault.is_stage_broken else []
    await pipeline.rebuild(broken)
    assert transport.parted == [stage for stage in (0, 1) if stage not in broken]
    output = await run_step(pipeline, replace(good, epoch=1))
    await transport.close()

    assert output.fault is None
    assert output.token_ids.tolist() == expected.token_ids.tolist() != []
    assert stages.replaced == replaced
