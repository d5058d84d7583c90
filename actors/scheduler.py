"""The actor that owns a pipeline and the state of its requests."""

import asyncio
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from contextlib import contextmanager

from ray import serve
from ray.util import get_current_placement_group

from rayserve_sarathi.actors.logs import log_to_stderr
from rayserve_sarathi.actors.messages import OutputBatch, Submission, SubmitReply
from rayserve_sarathi.actors.outboxes import Outboxes
from rayserve_sarathi.actors.pipeline import ActorPipeline
from rayserve_sarathi.actors.stage_group import StageGroup, num_rank_threads
from rayserve_sarathi.actors.transport import TRANSPORTS, Transport
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.engine import Engine, RebuildLimit, make_scheduler
from rayserve_sarathi.errors import EngineDeadError, SarathiError
from rayserve_sarathi.execution.pipeline import Pipeline
from rayserve_sarathi.metrics import Snapshot
from rayserve_sarathi.models.resolve import ModelInfo, resolve_model
from rayserve_sarathi.registry import import_object, load
from rayserve_sarathi.routing import Call
from rayserve_sarathi.scheduling.build import max_steps_in_flight
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport
from rayserve_sarathi.step_log import PipelineTrace

logger = logging.getLogger(__name__)

_MIB = 1024 * 1024
_MAX_ITEMSIZE = 4
"""Bytes of the largest number that an activation consists of."""
_RECLAIM_PERIOD_S = 5.0
_READY_TIMEOUT_S = 3.0
"""Shorter than an ingress waits for all its pipelines: one that hangs must not make the others look dead."""
_FAREWELL_S = 3.0
"""So long an engine that has given up still answers: its ingresses read what became of their requests."""


class SchedulerActor:
    """One replica owns one pipeline. Requests come from ingresses, which read their outputs in batches.

    Args:
        config: The engine's, with a `device` that is not `auto`.
    """

    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        log_to_stderr()
        begin_s = time.monotonic()
        self._config = config
        self._pipeline_id = serve.get_replica_context().replica_id.unique_id
        with _phase("model description"):
            info = resolve_model(config)
        with _phase(f"{_describe_stages(config)} with weights and KV cache"):
            pipeline, num_blocks = await _start_pipeline(config, info)
        self._eos_token_ids = info.eos_token_ids
        self._outboxes = Outboxes(clock=time.monotonic)
        self._engine = Engine(
            make_scheduler(config, info, num_blocks=num_blocks),
            pipeline,
            deliver=self._outboxes.deliver,
            rebuild_limit=RebuildLimit(config.max_rebuilds, config.rebuild_window_s),
        )
        with _phase("warm-up: first tokens through all stages"):
            await self._engine.warm_up(config.scheduler.max_token_budget)
        gc.collect()
        gc.freeze()  # what lives now lives for good; a collection that visits it would stall every stream
        self._running = asyncio.create_task(self._run())
        self._reclaiming = asyncio.create_task(self._reclaim())
        logger.info(
            "ready after %.1f s: %s, %d KV blocks of %d tokens, budget %s tokens a step, transport %s",
            time.monotonic() - begin_s,
            config.model_name,
            num_blocks,
            config.block_size,
            config.scheduler.token_budget,
            config.transport,
        )

    async def submit(self, call: Call, submissions: list[Submission]) -> SubmitReply:
        """Queue the requests of an ingress; what is refused is said in the reply."""
        refusals: dict[str, SarathiError] = {}
        for submission in submissions:
            self._outboxes.open(call, submission.request_id)
            try:
                self._engine.add(
                    submission.request_id,
                    submission.prompt_token_ids,
                    submission.sampling,
                    eos_token_ids=self._eos_token_ids,
                    cache_salt=submission.cache_salt,
                    output_token_ids=submission.output_token_ids,
                )
            except SarathiError as error:
                self._outboxes.close(submission.request_id)
                refusals[submission.request_id] = error
        return SubmitReply(pipeline=self._pipeline_id, refusals=refusals)

    async def cancel(self, request_ids: list[str], *, pipeline: str, stopped_ids: Collection[str] = ()) -> None:
        """End requests that their client, or their ingress, has done with; their KV is free within a step.

        Those of `stopped_ids` have a complete text; the others' clients are gone.
        """
        assert pipeline == self._pipeline_id, f"a call for {pipeline} came to {self._pipeline_id}"
        for request_id in stopped_ids:
            self._outboxes.close(request_id)
            self._engine.stop(request_id)
        self._abort(request_ids)

    async def outputs(self, ingress: str, *, pipeline: str) -> AsyncIterator[OutputBatch]:
        """Yield what steps do for the requests of an ingress; end once it has had none open for a while."""
        assert pipeline == self._pipeline_id, f"a call for {pipeline} came to {self._pipeline_id}"
        async for outputs in self._outboxes.read(ingress):
            yield OutputBatch(outputs=outputs, num_waiting=self._engine.num_waiting)

    async def claim(self, ingress: str, request_ids: list[str]) -> None:
        """Hear which requests an ingress still has; one that it has twice not named is aborted."""
        self._abort(self._outboxes.claim(ingress, request_ids))

    async def note_late(self, gaps: list[tuple[str, LateGap]], *, pipeline: str) -> None:
        """Hear what reached clients late, by request id; see `Scheduler.note_late`."""
        assert pipeline == self._pipeline_id, f"a call for {pipeline} came to {self._pipeline_id}"
        for request_id, gap in gaps:
            self._engine.note_late(request_id, gap)

    async def find_overload(self, num_requests: int) -> SarathiError | None:
        """Return why `num_requests` more would be refused now, or None."""
        try:
            self._engine.check_capacity(num_requests)
        except SarathiError as error:
            return error
        return None

    async def check_health(self) -> None:
        """Serve asks this: a replica that raises is replaced. A pipeline that is being rebuilt is no reason to."""
        self._engine.check_alive()
        if self._reclaiming.done():
            raise EngineDeadError(f"the scheduler has lost a loop: {self._reclaiming.exception()!r}")

    async def check_ready(self) -> None:
        """Return if steps can run now; raises EngineDeadError."""
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                await self._engine.check_ready()
        except TimeoutError:
            raise EngineDeadError(f"a stage has not answered for {_READY_TIMEOUT_S:.0f} s") from None

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks this where pipelines are added and removed by load; see `autoscaling.PipelineLoad`."""
        state = self._engine.state()
        return {
            "backlog_steps": state.prefill_backlog_tokens / state.token_budget,
            "kv_cache_usage": state.kv_cache_usage,
            "num_open_requests": state.num_requests_running + state.num_requests_waiting,
            "max_num_seqs": self._config.scheduler.max_num_seqs,
        }

    async def record_routing_stats(self) -> dict[str, object]:
        """Serve asks this regularly, and tells every router; see `routing.PipelineReport`."""
        state = self._engine.state()
        return {
            "is_ready": not self._engine.is_rebuilding,
            "prefill_backlog_tokens": state.prefill_backlog_tokens,
            "num_open_requests": state.num_requests_running + state.num_requests_waiting,
            "last_calls": self._outboxes.last_calls(),
            "marks": self._engine.pack_marks(),
        }

    async def snapshot(self) -> Snapshot:
        """Return this pipeline's metrics."""
        return self._engine.snapshot(model_name=self._config.model_name, pipeline=self._pipeline_id)

    async def trace(self) -> PipelineTrace:
        """Return this pipeline's last steps."""
        return self._engine.trace(pipeline=self._pipeline_id)

    async def why(self, request_id: str) -> list[LateReport]:
        """Return which tokens of a request were late here, and why."""
        return self._engine.why(request_id)

    async def _run(self) -> None:
        """Run the engine; when it gives up, end this process, so that nobody takes it for one that still works."""
        try:
            await self._engine.run()
        except EngineDeadError as error:
            logger.critical("this replica ends: %s", error)
            await asyncio.sleep(_FAREWELL_S)
            os._exit(1)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._outboxes.close(request_id)
            self._engine.abort(request_id)

    async def _reclaim(self) -> None:
        """Abort the requests of ingresses that have fallen silent."""
        while True:
            await asyncio.sleep(_RECLAIM_PERIOD_S)
            self._abort(self._outboxes.expire())


async def _start_pipeline(config: EngineConfig, info: ModelInfo) -> tuple[Pipeline, int]:
    if config.transport == "inline":
        make_pipeline = import_object("rayserve_sarathi.execution.inline:make_inline_pipeline")
        made: tuple[Pipeline, int] = await asyncio.to_thread(make_pipeline, config, num_threads=num_rank_threads(1))
        return made
    placement_group = get_current_placement_group()
    assert placement_group is not None, "the deployment reserves a placement group"
    stages = StageGroup(config, placement_group=placement_group, first_bundle=1)
    num_blocks = await stages.start()
    transport: Transport = load("transport", config.transport, TRANSPORTS)(
        stages,
        config,
        # One stage has one step, and perhaps the next one already.
        max_steps_inside=max_steps_in_flight(config.pipeline_parallel_size) + config.async_scheduling,
        max_message_bytes=config.scheduler.max_step_tokens * info.decoder.hidden_size * _MAX_ITEMSIZE + 4 * _MIB,
    )
    pipeline = ActorPipeline(stages, transport, step_timeout_s=config.step_timeout_s)
    await pipeline.open()
    return pipeline, num_blocks


def _describe_stages(config: EngineConfig) -> str:
    ranks = f" of {config.tensor_parallel_size} ranks" if config.tensor_parallel_size > 1 else ""
    return f"{config.pipeline_parallel_size} stages{ranks}"


@contextmanager
def _phase(name: str) -> Iterator[None]:
    begin_s = time.monotonic()
    logger.info("start: %s ...", name)
    yield
    logger.info("start: %s: %.1f s", name, time.monotonic() - begin_s)
