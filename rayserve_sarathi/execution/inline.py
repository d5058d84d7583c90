"""The transport without Ray: all stages in this process, for offline use, tests, and CPUs with few cores."""

import asyncio
import os
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in torch's __all__

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.execution.stage import LaunchedStep, Stage, StageMessage
from rayserve_sarathi.kernels.layers import StageRun
from rayserve_sarathi.models.load import resolve_device
from rayserve_sarathi.models.parallel import join
from rayserve_sarathi.step import StepInput, StepOutput


def make_inline_pipeline(config: EngineConfig, *, num_threads: int | None = None) -> tuple["InlinePipeline", int]:
    """Load all stages into this process.

    Args:
        config: The engine's.
        num_threads: Threads of torch in this process, over all ranks of a stage; None leaves them as they are.

    Returns:
        The pipeline, and the number of KV blocks of each stage.

    Raises:
        ConfigError: The weights are not to be had, or leave no room, or cannot be split as asked for.
    """
    tp_size = config.tensor_parallel_size
    device = resolve_device(config)
    config = replace(config, transport="inline", device="cuda" if device.type == "cuda" else "cpu")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    store = HashStore()

    def load(tp_rank: int) -> list[Stage]:
        tp = join(
            store,
            tp_rank=tp_rank,
            tp_size=tp_size,
            meeting_timeout_s=config.placement_timeout_s,
            timeout_s=config.step_timeout_s,
            device=device,
        )
        stages = [Stage(config, index=index, tp=tp) for index in range(config.pipeline_parallel_size)]
        for stage in stages:
            stage.load()
        return stages

    # Ranks wait for each other, so each has a thread.
    with ThreadPoolExecutor(max_workers=tp_size) as threads:
        ranks = list(threads.map(load, range(tp_size)))
    num_blocks = min(stage.fit() for stages in ranks for stage in stages)
    for stages in ranks:
        for stage in stages:
            stage.start(num_blocks)
    return InlinePipeline(ranks, step_timeout_s=config.step_timeout_s), num_blocks


_Awaited = tuple[Future[StepOutput | LaunchedStep], Future[StepOutput]]
"""A step that is launched or to be launched, and what comes of it, for which a thread waits."""


class InlinePipeline:
    """Stages of this process, each tensor-parallel rank of them on a worker thread, or on threads of its own.

    Args:
        ranks: For each rank its stages, first to last, started.
        step_timeout_s: A step that takes longer means that the pipeline is dead.
    """

    def __init__(self, ranks: Sequence[Sequence[Stage]], *, step_timeout_s: float) -> None:
        self._ranks = ranks
        self._step_timeout_s = step_timeout_s
        # The first thread runs rank 0 and has the others run theirs, so that a step begins on all ranks or on none.
        share = max(1, torch.get_num_threads() // len(ranks))
        self._thread, *self._others = (
            ThreadPoolExecutor(
                max_workers=1,
                thread_name_prefix=f"rank-{tp_rank}",
                initializer=torch.set_num_threads,
                initargs=(share,),
            )
            for tp_rank in range(len(ranks))
        )
        # Waits for what the event loop cannot wait for, while the next step is launched.
        self._waiting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="waiting")
        self._inside: asyncio.Queue[LaunchedStep | _Awaited] = asyncio.Queue()
        self._ended_fd = ranks[0][0].ended_fd if len(ranks) == len(ranks[0]) == 1 else None
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # that listens to `_ended_fd`
        self._newest: Future[StepOutput | LaunchedStep] | None = None
        """Of the last step, done when it is launched; None before the first."""

    async def submit(self, step: StepInput) -> None:
        """Give the step to the stages, or queue it for the worker threads."""
        is_launched = self._newest is None or self._newest.done()
        launched: Future[StepOutput | LaunchedStep]
        if is_launched and not self._others and self._ranks[0][0].returns_at_once(step):
            output = self._run(step)
            if isinstance(output, LaunchedStep) and output.run is not None and self._ended_fd is not None:
                self._listen(self._ended_fd)
                self._inside.put_nowait(output)
                return
            launched = Future()
            launched.set_result(output)
        else:
            launched = self._thread.submit(self._run, step)
        self._newest = launched
        self._inside.put_nowait((launched, self._waiting.submit(_wait, launched)))

    async def receive(self) -> StepOutput:
        """Wait for the oldest step."""
        oldest = await self._inside.get()
        try:
            async with asyncio.timeout(self._step_timeout_s):
                if not isinstance(oldest, LaunchedStep):
                    return await asyncio.wrap_future(oldest[1])
                assert oldest.run is not None, "another thread is to wait for it"
                await self._until_done(oldest.run)
                return oldest.wait()
        except TimeoutError:
            raise EngineDeadError(f"a step took longer than step_timeout_s={self._step_timeout_s}") from None

    async def rebuild(self, broken: Collection[int]) -> None:
        """Raise: the stages share this process, with whatever broke them."""
        raise EngineDeadError("stages inside this process cannot be replaced")

    async def check_health(self) -> None:
        """Return: threads of this process are as alive as the caller."""

    async def close(self) -> None:
        """Let the threads end after the steps that they have begun."""
        while not self._inside.empty():
            if not isinstance(inside := self._inside.get_nowait(), LaunchedStep):
                for future in inside:
                    future.cancel()
        if self._loop is not None:
            assert self._ended_fd is not None
            self._loop.remove_reader(self._ended_fd)
        self._thread.submit(self._close_others)
        self._thread.shutdown(wait=False)
        self._waiting.shutdown(wait=False)

    def _listen(self, ended_fd: int) -> None:
        if self._loop is not None:
            return

        def note() -> None:
            os.eventfd_read(ended_fd)
            self._ended.set()

        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(ended_fd, note)

    async def _until_done(self, run: StageRun) -> None:
        while not run.is_done:
            self._ended.clear()
            await self._ended.wait()

    def _run(self, step: StepInput) -> StepOutput | LaunchedStep:
        if not self._others:
            return _launch_stages(self._ranks[0], step)
        others = [
            thread.submit(_run_stages, stages, step)
            for thread, stages in zip(self._others, self._ranks[1:], strict=True)
        ]
        output = _run_stages(self._ranks[0], step)
        faults = [fault for fault in (output.fault, *(other.result().fault for other in others)) if fault is not None]
        return replace(output, fault=min(faults, key=lambda fault: fault.is_consequence, default=None))

    def _close_others(self) -> None:
        for thread in self._others:
            thread.shutdown(wait=False)


def _launch_stages(stages: Sequence[Stage], step: StepInput) -> StepOutput | LaunchedStep:
    message: StageMessage | StepOutput | LaunchedStep = StageMessage(step=step)
    for stage in stages:
        assert isinstance(message, StageMessage)
        message = stage.launch(message)
    assert not isinstance(message, StageMessage)
    return message


def _run_stages(stages: Sequence[Stage], step: StepInput) -> StepOutput:
    launched = _launch_stages(stages, step)
    return launched.wait() if isinstance(launched, LaunchedStep) else launched


def _wait(launched: Future[StepOutput | LaunchedStep]) -> StepOutput:
    output = launched.result()
    return output.wait() if isinstance(output, LaunchedStep) else output
