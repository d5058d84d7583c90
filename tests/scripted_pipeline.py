"""A pipeline that does what a test tells it to."""

import asyncio
import time
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from rayserve_sarathi.errors import PipelineFaultError
from rayserve_sarathi.step import StageTiming, StepFault, StepInput, StepOutput
from tests.factories import HashModel


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
        self.step_fault = StepFault(message="stage 1 failed", stage=1)
        self.lost: PipelineFaultError | None = None
        self.fault: PipelineFaultError | None = None
        self.rebuilds: list[set[int]] = []
        self.rebuild_faults: list[Exception] = []
        self.is_rebuilding = asyncio.Event()
        self.may_rebuild = asyncio.Event()
        self.may_rebuild.set()
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
        if self.fault is not None:
            raise self.fault
        if self.num_failing:
            self.num_failing -= 1
            return StepOutput(
                step_id=step.step_id,
                epoch=step.epoch,
                token_ids=np.empty(0, np.int32),
                fault=self.step_fault,
            )
        return replace(self._model.run(step), timings=self._time_stages())

    def _time_stages(self) -> tuple[StageTiming, ...]:
        """Each stage's clock is its own."""
        now_s = time.monotonic()
        return tuple(
            StageTiming(stage=stage, receive_s=clock_s + now_s, start_s=clock_s + now_s, end_s=clock_s + now_s)
            for stage, clock_s in enumerate((1000.0, -1000.0))
        )

    async def rebuild(self, broken: Collection[int]) -> None:
        self.rebuilds.append(set(broken))
        self.is_rebuilding.set()
        await self.may_rebuild.wait()
        if self.rebuild_faults:
            raise self.rebuild_faults.pop()
        self._inside = asyncio.Queue()
        self._model = HashModel(num_blocks=64, block_size=4)
        self.fault = None
        self.lost = None

    async def check_health(self) -> None:
        if fault := self.fault or self.lost:
            raise fault

    async def close(self) -> None:
        self.is_closed = True
