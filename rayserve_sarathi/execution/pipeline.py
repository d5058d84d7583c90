"""How steps travel through stages: the interface, what a stage does with a message, the transport without Ray."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.step import StageTiming, StepInput, StepOutput

logger = logging.getLogger(__name__)


class Pipeline(Protocol):
    """Stages in a row. Steps go in and come out in the same order; several may be inside."""

    async def submit(self, step: StepInput) -> None:
        """Send a step to the first stage."""

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside; while there is none, for the next one.

        Raises:
            EngineDeadError: A stage is gone, or took longer than `step_timeout_s`.
        """

    async def check_health(self) -> None:
        """Return if all stages answer.

        Raises:
            EngineDeadError: One does not; the message says which.
        """

    async def close(self) -> None:
        """Stop the stages and free what they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMessage:
    """What one stage sends to the next.

    Args:
        step: The step, as the scheduler made it.
        hidden: Activations, [T, hidden size]; None on the way to the first stage, and after an error.
        timings: One entry for each stage that is done.
        error: Why a stage could not compute the step; those behind it pass it on.
    """

    step: StepInput
    hidden: torch.Tensor | None = None
    timings: tuple[StageTiming, ...] = ()
    error: str | None = None


def run_stage(runner: ModelRunner, message: StageMessage, *, stage: int) -> StageMessage | StepOutput:
    """Compute one stage's part of a step; an exception becomes the error of this step and of no other."""
    receive_s = time.monotonic()
    step, error = message.step, message.error
    hidden: torch.Tensor | None = None
    output: StepOutput | None = None
    start_s = time.monotonic()
    if error is None:
        try:
            hidden = runner.forward(step, message.hidden)
            output = runner.sample(step, hidden) if runner.is_last else None
        except Exception as exception:  # the outermost frame of a stage: whatever it is, it fails this step alone
            logger.exception("stage %d failed in step %d of requests %s", stage, step.step_id, step.request_ids)
            error = f"stage {stage} failed with {type(exception).__name__}"
    timings = (
        *message.timings,
        StageTiming(stage=stage, receive_s=receive_s, start_s=start_s, end_s=time.monotonic()),
    )
    if not runner.is_last:
        return StageMessage(step=step, hidden=hidden, timings=timings, error=error)
    if output is None:
        output = StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=np.empty(0, dtype=np.int32), error=error)
    return replace(output, timings=timings)


class InlinePipeline:
    """All stages in this process, on one worker thread: for offline use and tests.

    Args:
        runners: The stages, first to last.
        step_timeout_s: A step that takes longer means that the pipeline is dead.
    """

    def __init__(self, runners: Sequence[ModelRunner], *, step_timeout_s: float) -> None:
        self._runners = runners
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
        message: StageMessage | StepOutput = StageMessage(step=step)
        for stage, runner in enumerate(self._runners):
            assert isinstance(message, StageMessage)
            message = run_stage(runner, message, stage=stage)
        assert isinstance(message, StepOutput)
        return message
