"""The transport without Ray: all stages in this process, for offline use, tests, and CPUs with few cores."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.execution.stage import Stage, StageMessage
from rayserve_sarathi.step import StepInput, StepOutput


def make_inline_pipeline(config: EngineConfig, *, num_threads: int | None = None) -> tuple["InlinePipeline", int]:
    """Load all stages into this process.

    Args:
        config: The engine's.
        num_threads: Threads of torch in this process; None leaves them as they are.

    Returns:
        The pipeline, and the number of KV blocks of each stage.

    Raises:
        ConfigError: The weights are not to be had, or leave no room.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    stages = [Stage(config, index=index) for index in range(config.pipeline_parallel_size)]
    for stage in stages:
        stage.load()
    num_blocks = min(stage.fit() for stage in stages)
    for stage in stages:
        stage.start(num_blocks)
    return InlinePipeline(stages, step_timeout_s=config.step_timeout_s), num_blocks


class InlinePipeline:
    """Stages of this process, on one worker thread.

    Args:
        stages: First to last, started.
        step_timeout_s: A step that takes longer means that the pipeline is dead.
    """

    def __init__(self, stages: Sequence[Stage], *, step_timeout_s: float) -> None:
        self._stages = stages
        self._step_timeout_s = step_timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stages")
        self._inside: asyncio.Queue[Future[StepOutput]] = asyncio.Queue()

    async def submit(self, step: StepInput) -> None:
        """Queue the step for the worker thread."""
        self._inside.put_nowait(self._thread.submit(self._run, step))

    async def receive(self) -> StepOutput:
        """Wait for the oldest step."""
        future = await self._inside.get()
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._step_timeout_s)
        except TimeoutError:
            raise EngineDeadError(f"a step took longer than step_timeout_s={self._step_timeout_s}") from None

    async def check_health(self) -> None:
        """Return: a thread of this process is as alive as the caller."""

    async def close(self) -> None:
        """Let the worker thread end after the step that it is in."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, step: StepInput) -> StepOutput:
        message = self._stages[0].execute_first(step)
        for stage in self._stages[1:]:
            assert isinstance(message, StageMessage)
            message = stage.execute(message)
        assert isinstance(message, StepOutput)
        return message
