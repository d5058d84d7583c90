"""The transport without Ray: all stages in this process, for offline use, tests, and CPUs with few cores."""

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

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


_Launched = StepOutput | LaunchedStep
"""A step that all stages have, or the output of one that needed no device."""


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
        self._inside: asyncio.Queue[_Launched | Future[_Launched]] = asyncio.Queue()
        self._newest: Future[_Launched] | None = None
        """Of the last step that a worker thread launches or has launched."""
        self._ended = _Ended()

    async def submit(self, step: StepInput) -> None:
        """Give the step to the stages, or queue it for the worker threads."""
        is_launched = self._newest is None or self._newest.done()
        if is_launched and not self._others and self._ranks[0][0].returns_at_once(step):
            self._inside.put_nowait(self._run(step))
        else:
            self._newest = self._thread.submit(self._run, step)
            self._inside.put_nowait(self._newest)

    async def receive(self) -> StepOutput:
        """Wait for the oldest step."""
        launched = await self._inside.get()
        try:
            async with asyncio.timeout(self._step_timeout_s):
                if isinstance(launched, LaunchedStep) and launched.run is not None:
                    fd = launched.run.ended_fd
                    if fd is not None:
                        await self._ended.wait(launched.run, fd)
                        return launched.wait()
                return await asyncio.wrap_future(self._waiting.submit(_wait, launched))
        except TimeoutError:
            raise EngineDeadError(f"a step took longer than step_timeout_s={self._step_timeout_s}") from None

    async def rebuild(self, broken: Collection[int]) -> None:
        """Raise: the stages share this process, with whatever broke them."""
        raise EngineDeadError("stages inside this process cannot be replaced")

    async def check_health(self) -> None:
        """Return: threads of this process are as alive as the caller."""

    async def close(self) -> None:
        """Let the threads end after the steps that they have begun; nobody may be in `receive`."""
        while not self._inside.empty():
            if isinstance(launched := self._inside.get_nowait(), Future):
                launched.cancel()
        self._ended.close()
        self._thread.submit(self._close_others)
        self._thread.shutdown(wait=False)
        self._waiting.shutdown(wait=False)

    def _run(self, step: StepInput) -> _Launched:
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


class _Ended:
    """Lets an event loop wait for one after the other of a stage's runs."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._stop: Callable[[], object] | None = None

    async def wait(self, run: StageRun, fd: int) -> None:
        if self._stop is None:
            loop = asyncio.get_running_loop()
            loop.add_reader(fd, self._note, fd)
            self._stop = partial(loop.remove_reader, fd)
        while not run.is_done:
            self._event.clear()
            await self._event.wait()

    def close(self) -> None:
        if self._stop is not None:
            self._stop()

    def _note(self, fd: int) -> None:
        os.eventfd_read(fd)
        self._event.set()


def _launch_stages(stages: Sequence[Stage], step: StepInput) -> _Launched:
    message: StageMessage | StepOutput | LaunchedStep = StageMessage(step=step)
    for stage in stages:
        assert isinstance(message, StageMessage)
        message = stage.launch(message)
    assert not isinstance(message, StageMessage)
    return message


def _run_stages(stages: Sequence[Stage], step: StepInput) -> StepOutput:
    launched = _launch_stages(stages, step)
    return launched.wait() if isinstance(launched, LaunchedStep) else launched


def _wait(launched: _Launched | Future[_Launched]) -> StepOutput:
    output = launched.result() if isinstance(launched, Future) else launched
    return output.wait() if isinstance(output, LaunchedStep) else output
