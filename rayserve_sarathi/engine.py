"""The loop that joins a scheduler and a pipeline, and brings a pipeline that failed back."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import EngineDeadError, PipelineFaultError, SarathiError
from rayserve_sarathi.execution.pipeline import Pipeline
from rayserve_sarathi.kernels.attention import ATTENTION_BACKENDS
from rayserve_sarathi.load_report import LoadReport
from rayserve_sarathi.metrics import SchedulerState, Snapshot
from rayserve_sarathi.models.resolve import ModelInfo
from rayserve_sarathi.registry import check_name
from rayserve_sarathi.request import FinishReason, Request, RequestOutput, SamplingParams
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.scheduling.build import build_scheduler
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport
from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.hardware import find_hardware
from rayserve_sarathi.simulation.model_shape import rank_shape
from rayserve_sarathi.simulation.roofline import RooflineTimes
from rayserve_sarathi.step_log import PipelineTrace, StepLog
from rayserve_sarathi.step_shape import StepTimeModel

logger = logging.getLogger(__name__)

Deliver = Callable[[list[RequestOutput]], None]

_MAX_FAILED_STEPS = 8
"""A single bad step fails its own requests; so many in a row mean that the pipeline is broken."""
_MIN_REBUILD_PAUSE_S = 0.5
"""Between an attempt that failed and the next; it doubles each time."""


class RebuildLimit:
    """How often a pipeline may be rebuilt before it is given up.

    Args:
        max_rebuilds: Within any `window_s` seconds.
        window_s: See `max_rebuilds`.
    """

    def __init__(self, max_rebuilds: int, window_s: float) -> None:
        self._max_rebuilds = max_rebuilds
        self.window_s = window_s
        self._rebuilds_s: deque[float] = deque()

    def count(self, now_s: float) -> bool:
        """Count one more; return whether it is within the limit."""
        self._rebuilds_s.append(now_s)
        while self._rebuilds_s[0] < now_s - self.window_s:
            self._rebuilds_s.popleft()
        return len(self._rebuilds_s) <= self._max_rebuilds


def check_names(config: EngineConfig) -> None:
    """Look for what `config` names, which is cheaper to get wrong before the weights are loaded.

    Raises:
        ConfigError: There is no such policy or attention backend.
    """
    check_name("scheduler policy", config.scheduler.policy, SCHEDULERS)
    if config.attention_backend != "auto":
        check_name("attention backend", config.attention_backend, ATTENTION_BACKENDS)


def make_scheduler(config: EngineConfig, info: ModelInfo, *, num_blocks: int) -> Scheduler:
    """Build the scheduler of a pipeline whose stages have `num_blocks` KV blocks each.

    Raises:
        ConfigError: There is no such policy.
    """
    return build_scheduler(
        config.scheduler,
        num_blocks=num_blocks,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        num_stages=config.pipeline_parallel_size,
        slo=config.slo,
        prior=believed_step_times(config, info),
        is_async=config.async_scheduling,
    )


def believed_step_times(config: EngineConfig, info: ModelInfo) -> StepTimeModel | None:
    """Return what steps are believed to take before any has come back; None for a GPU, whatever it is.

    On a CPU a chunk of 250 tokens takes some 25 times as long as a few decodes, and not as long, as on a GPU. The scale
    is learnt from a few steps, but this only from chunks, the first of which would hold up all that decode.
    """
    if config.device != "cpu":
        return None
    shape = rank_shape(
        info.decoder,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
    )
    hardware = find_hardware("cpu")
    return CostModel(shape, RooflineTimes(shape, hardware, is_multi_node=False), itemsize=hardware.itemsize)


class Engine:
    """Submit steps while there is something to compute, take their results, hand out what came of them.

    Args:
        scheduler: Taken over; nobody else calls it.
        pipeline: Taken over likewise.
        deliver: Called once a step with what it did for its requests.
        rebuild_limit: How often a pipeline that failed is rebuilt.
        clock: Seconds, monotonic.
        report_period_s: How often a line in the log says what the engine does, while it does something.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        *,
        deliver: Deliver,
        rebuild_limit: RebuildLimit,
        clock: Callable[[], float] = time.monotonic,
        report_period_s: float = 10.0,
    ) -> None:
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._deliver = deliver
        self._rebuild_limit = rebuild_limit
        self._clock = clock
        self._report_period_s = report_period_s
        self._steps = StepLog()
        self._wake = asyncio.Event()
        self._is_rebuilding = False
        self._fault: str | None = None

    def check_capacity(self, num_requests: int) -> None:
        """Return if the queue has room.

        Raises:
            OverloadedError: It has not.
            EngineDeadError: The pipeline is dead.
        """
        self.check_alive()
        self._scheduler.check_capacity(num_requests, self._clock())

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_token_ids: Iterable[int] = (),
        cache_salt: str = "",
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Queue a request; `deliver` gets its tokens.

        Args:
            request_id: Unique.
            prompt_token_ids: At least one token.
            sampling: How to choose tokens.
            eos_token_ids: Tokens that end it.
            cache_salt: See `Request`.
            output_token_ids: Tokens that an earlier engine generated; `deliver` gets those that follow.

        Raises:
            InvalidRequestError: It can never be served.
            OverloadedError: The queue is full.
            EngineDeadError: The pipeline is dead.
        """
        self.check_alive()
        self._scheduler.add(
            Request(
                request_id,
                prompt_token_ids,
                sampling,
                eos_token_ids=eos_token_ids,
                cache_salt=cache_salt,
                output_token_ids=output_token_ids,
                arrival_s=self._clock(),
            )
        )
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """End a request, in any phase; nothing more is delivered for it. One that has ended is left alone."""
        if self._scheduler.abort(request_id):
            self._wake.set()  # what it held may be what another waits for

    def stop(self, request_id: str) -> None:
        """End a request whose text is complete; see `Scheduler.stop`."""
        if self._scheduler.stop(request_id, self._clock()):
            self._wake.set()

    async def warm_up(self, num_tokens: int) -> None:
        """Send a prompt of up to `num_tokens` and two generated tokens through all stages; then the engine is ready.

        Raises:
            EngineDeadError: They did not come through.
        """
        room = self._scheduler.max_model_len
        prompt = [0] * max(min(num_tokens, room - 2), 1)
        sampling = SamplingParams(max_tokens=min(2, room - len(prompt)), temperature=0, ignore_eos=True)
        self._scheduler.add(Request("warm-up", prompt, sampling, cache_salt="warm-up"))
        while self._scheduler.has_unfinished_requests:
            step = self._scheduler.schedule(self._clock())
            assert step is not None, "a request is open, and nothing is in flight"
            await self._pipeline.submit(step)
            for output in self._scheduler.update(await self._pipeline.receive(), self._clock()):
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineDeadError(f"the first step failed: {output.error}")
        self._scheduler.reset_metrics()

    async def run(self) -> None:
        """Run until cancelled, or until the pipeline has failed more often than it may.

        Raises:
            EngineDeadError: The pipeline is given up; every open request was told.
        """
        reporting = asyncio.create_task(self._report_load())
        try:
            while True:
                try:
                    await self._run_steps()
                except PipelineFaultError as fault:
                    await self._rebuild(fault)
        except asyncio.CancelledError:
            self._die("the engine was stopped")
            raise
        except Exception as error:  # the outermost frame of the loop: whoever waits for tokens must hear of it
            logger.exception("the engine stops")
            fault_text = str(error) if isinstance(error, SarathiError) else f"internal error ({type(error).__name__})"
            self._die(fault_text)
            raise EngineDeadError(fault_text) from error
        finally:
            reporting.cancel()

    def check_alive(self) -> None:
        """Return unless the pipeline was given up; one that is being rebuilt is alive.

        Raises:
            EngineDeadError: It was.
        """
        if self._fault is not None:
            raise EngineDeadError(self._fault)

    async def check_ready(self) -> None:
        """Return if steps can run now: the pipeline is not being rebuilt, and all its stages answer.

        Raises:
            EngineDeadError: They cannot; the message says why.
        """
        self.check_alive()
        if self._is_rebuilding:
            raise EngineDeadError("the pipeline is being rebuilt after a fault")
        await self._pipeline.check_health()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first step."""
        return self._scheduler.num_waiting

    def state(self) -> SchedulerState:
        """Return where the scheduler stands."""
        return self._scheduler.state()

    def pack_marks(self) -> bytes:
        """Return what tells others which prefixes are cached here; see `BlockManager.pack_marks`."""
        return self._scheduler.pack_marks()

    @property
    def is_rebuilding(self) -> bool:
        """Whether the pipeline has failed and is not back yet: requests wait."""
        return self._is_rebuilding

    def snapshot(self, *, model_name: str, pipeline: str) -> Snapshot:
        """Return the metrics of scheduler and stages as they are now."""
        return Snapshot(
            model_name=model_name,
            pipeline=pipeline,
            metrics=self._scheduler.metrics,
            state=self._scheduler.state(),
            stages=self._steps.stage_times.totals(),
        )

    def trace(self, *, pipeline: str) -> PipelineTrace:
        """Return the last steps, one by one."""
        return self._steps.trace(pipeline=pipeline, now_s=self._clock())

    @property
    def tbt_s(self) -> float | None:
        """The target of the time between tokens, in seconds; None if there is none."""
        return self._scheduler.tbt_s

    def note_late(self, request_id: str, gap: LateGap) -> None:
        """See `Scheduler.note_late`."""
        self._scheduler.note_late(request_id, gap)

    def why(self, request_id: str) -> list[LateReport]:
        """Return which tokens of a request were late, and why; see `LateTokens.reports`."""
        return self._scheduler.late_reports(request_id)

    async def _run_steps(self) -> None:
        tasks = [asyncio.create_task(self._submit_steps()), asyncio.create_task(self._receive_steps())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # it ends only by an error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _rebuild(self, fault: PipelineFaultError) -> None:
        """Bring the pipeline back, though it may fail again meanwhile."""
        self._is_rebuilding = True
        begin_s = self._clock()
        broken = set(fault.stages)
        pause_s = 0.0
        while True:
            self._scheduler.metrics.num_stage_restarts[fault.reason] += 1
            is_within = self._rebuild_limit.count(self._clock())
            # Attempts that each take long never are many in a window.
            if not is_within or self._clock() - begin_s > self._rebuild_limit.window_s:
                raise EngineDeadError(f"the pipeline is given up: {fault}")
            logger.warning("the pipeline failed (%s); rebuilding it", fault, exc_info=fault.__cause__)
            self._scheduler.restart()
            self._steps.restart()
            # What was in the way of the last attempt may take a while to go, such as memory of a process that ends.
            await asyncio.sleep(pause_s)
            try:
                await self._pipeline.rebuild(broken)
                break
            except PipelineFaultError as another:
                fault = another
                broken |= another.stages
                pause_s = max(2 * pause_s, _MIN_REBUILD_PAUSE_S)
            except EngineDeadError as error:
                raise EngineDeadError(f"the pipeline is given up: {fault}; {error}") from error
        self._is_rebuilding = False
        num_requests = len(list(self._scheduler.request_ids()))
        logger.info("the pipeline is back after %.1f s; %d requests go on", self._clock() - begin_s, num_requests)

    async def _submit_steps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            while (step := self._scheduler.schedule(self._clock())) is not None:
                self._steps.note_submit(step, self._clock())
                await self._pipeline.submit(step)
            due_s = self._scheduler.ahead_due_s - self._clock()
            alarm = loop.call_later(due_s, self._wake.set) if 0 < due_s < math.inf else None
            await self._wake.wait()
            if alarm is not None:
                alarm.cancel()

    async def _receive_steps(self) -> None:
        num_failures = 0
        while True:
            step_output = await self._pipeline.receive()
            fault = step_output.fault
            if fault is not None and fault.is_consequence:
                # If what it follows from is a death, that is no fault of the step's requests: they go on.
                await self._pipeline.check_health()
            now_s = self._clock()
            outputs = self._scheduler.update(step_output, now_s)
            self._wake.set()
            if outputs:
                self._deliver(outputs)
            self._steps.note_return(step_output, now_s)
            num_failures = 0 if fault is None else num_failures + 1
            if fault is not None and fault.is_stage_broken:
                raise PipelineFaultError(fault.message, reason="failed", stages=(fault.stage,))
            if fault is not None and num_failures >= _MAX_FAILED_STEPS:
                message = f"{num_failures} steps in a row failed; the last one: {fault.message}"
                raise PipelineFaultError(message, reason="failed", stages=(fault.stage,))

    async def _report_load(self) -> None:
        report = LoadReport(self._clock())
        while True:
            await asyncio.sleep(self._report_period_s)
            line = report.line(self.snapshot(model_name="", pipeline=""), self._clock())
            if line is not None:
                logger.info("%s", line)

    def _die(self, fault: str) -> None:
        self._fault = fault
        self._scheduler.restart()  # nothing is in flight any more
        self._deliver(self._scheduler.lose_all(fault))
