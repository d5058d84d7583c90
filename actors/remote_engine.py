"""The scheduler actors as an engine client: submit, read one stream of outputs per pipeline, cancel, submit again."""

import asyncio
import itertools
import logging
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from rayserve_sarathi.actors.messages import OutputBatch, SubmitReply
from rayserve_sarathi.actors.open_request import OpenRequest
from rayserve_sarathi.actors.placement_watch import PlacementWatch
from rayserve_sarathi.actors.standby import stands_by
from rayserve_sarathi.errors import EngineDeadError, OverloadedError, SarathiError
from rayserve_sarathi.kv.prefix_marks import PrefixMarks, marks_of_prompt
from rayserve_sarathi.metrics import Snapshot, render
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams
from rayserve_sarathi.routing import Call, group_by_prefix
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport
from rayserve_sarathi.step_log import PipelineTrace

logger = logging.getLogger(__name__)

_SUBMIT_TIMEOUT_S = 10.0
_CONTROL_TIMEOUT_S = 5.0
_CLAIM_PERIOD_S = 5.0
_SILENCE_S = 30.0
"""A stream of outputs shows every second that it is alive; if it does not for this long, its pipeline is lost."""
_RETRY_S = 0.25
_MAX_LOSSES = 3
"""A request that has lost so many pipelines without a token between may be what kills them."""
_MAX_PLACES = 1024
_CALL_ERRORS = (RayError, RayServeException, TimeoutError)


class RemoteEngine:
    """See `openai.engine_client.EngineClient`.

    Submissions of one moment travel in one call or, where there are several pipelines, in one for each prefix, as a
    call goes to one pipeline. Outputs of all requests at a pipeline come back through one stream, open while there are
    any. When a pipeline is lost, its requests are submitted again with the tokens they got; a pipeline that has given
    up by itself says so, and its requests fail.

    Args:
        scheduler: Handle of the scheduler deployment.
        placement: Knows whether its pipelines have found their place.
        ingress: Name of this ingress, different from all others.
        max_num_waiting: Size of a scheduler's queue.
        block_size: Tokens in a KV block; None if prefixes are not cached.
        pipeline_timeout_s: How long a request waits for a pipeline that takes it.
        tbt_s: The target of the time between tokens, if there is one.
    """

    def __init__(
        self,
        scheduler: DeploymentHandle[Any],
        placement: PlacementWatch,
        *,
        ingress: str,
        max_num_waiting: int,
        block_size: int | None,
        pipeline_timeout_s: float,
        tbt_s: float | None,
    ) -> None:
        self._scheduler = scheduler
        self._placement = placement
        self._ingress = ingress
        self._max_num_waiting = max_num_waiting
        self._block_size = block_size
        self._pipeline_timeout_s = pipeline_timeout_s
        self._tbt_s = tbt_s
        self._requests: dict[str, OpenRequest] = {}
        self._open: dict[str, OpenRequest] = {}
        """By attempt id, which is what a scheduler knows a request by."""
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._outbound: list[OpenRequest] = []
        self._cancels: dict[str, dict[str, bool]] = {}
        """By pipeline and attempt id: whether the text is complete."""
        self._late: dict[str, list[tuple[str, LateGap]]] = {}
        """By pipeline: attempt ids, and what their clients got late."""
        self._places: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Pipeline and attempt id of the last requests that are closed: their clients may still read."""
        self._has_work = asyncio.Event()
        self._num_pipelines = 1
        """As many as answered last."""
        self._num_waiting = 0
        self._num_since_report = 0
        self._call_numbers = itertools.count(1)
        self._calls: set[asyncio.Task[None]] = set()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._claim())]

    @property
    def tbt_s(self) -> float | None:
        """See `EngineClient`."""
        return self._tbt_s

    async def check_capacity(self, num_requests: int) -> None:
        """See `EngineClient`. Asks the scheduler only if its queue might be full by what is known here."""
        self._placement.check()
        self._num_since_report += num_requests
        if self._num_waiting + self._num_since_report > self._max_num_waiting:
            overload = await self._call_control(self._scheduler.find_overload.remote(num_requests))
            if overload is not None:
                self._num_since_report -= num_requests
                raise overload

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """See `EngineClient`."""
        token_ids = array("i", prompt_token_ids)
        # Where there is one pipeline at most, nobody asks for the marks.
        if self._num_pipelines <= 1 or self._block_size is None or sampling.prompt_logprobs is not None:
            prefix = PrefixMarks()
        else:
            prefix = marks_of_prompt(token_ids, block_size=self._block_size, cache_salt=cache_salt)
        request = OpenRequest(request_id, token_ids, sampling, cache_salt=cache_salt, prefix=prefix)
        self._requests[request_id] = request
        self._dispatch(request)
        try:
            while not request.is_closed:
                output = await request.next_output()
                if output.finish_reason is not None:
                    self._close(request)
                yield output
        finally:
            del self._requests[request_id]
            if request.pipeline is not None:
                self._places[request_id] = request.pipeline, request.attempt_id
                if len(self._places) > _MAX_PLACES:
                    self._places.popitem(last=False)
            if self._close(request):
                self._cancel(request)

    def finish(self, request_id: str) -> None:
        """See `EngineClient`."""
        request = self._requests.get(request_id)
        if request is not None and self._close(request):
            request.is_stopped = True
            self._cancel(request)

    def note_late(self, request_id: str, gap: LateGap) -> None:
        """See `EngineClient`."""
        place = self._places.get(request_id)
        if (request := self._requests.get(request_id)) is not None and request.pipeline is not None:
            place = request.pipeline, request.attempt_id
        if place is not None:
            pipeline, attempt_id = place
            self._late.setdefault(pipeline, []).append((attempt_id, gap))
            self._has_work.set()

    async def check_ready(self) -> None:
        """See `EngineClient`. Ready is also who has scaled to zero, as the next request starts a pipeline."""
        self.check_health()
        self._placement.check()
        # To all: a call to any one would wait while there is none, and so start one.
        answers = await self._ask_all("check_ready")
        if not answers and not await stands_by(self._scheduler.app_name, self._scheduler.deployment_name):
            raise EngineDeadError("no pipeline is there")
        if answers and all(isinstance(answer, Exception) for answer in answers):
            fault = answers[0]
            raise fault if isinstance(fault, SarathiError) else EngineDeadError(f"no pipeline answers ({fault!r})")

    def check_health(self) -> None:
        """Raise EngineDeadError if a loop of this object has ended, which only a bug of ours makes them do."""
        for task in self._tasks:
            if task.done():
                raise EngineDeadError(f"the ingress has lost a loop: {task.exception()!r}")

    async def metrics(self) -> str:
        """See `EngineClient`. One section for each pipeline."""
        return render([answer for answer in await self._ask_all("snapshot") if isinstance(answer, Snapshot)])

    async def trace(self) -> list[PipelineTrace]:
        """See `EngineClient`."""
        return [answer for answer in await self._ask_all("trace") if isinstance(answer, PipelineTrace)]

    async def why(self, request_id: str) -> list[LateReport]:
        """See `EngineClient`."""
        answers = await self._ask_all("why", request_id)
        return [report for answer in answers if isinstance(answer, list) for report in answer]

    def _dispatch(self, request: OpenRequest) -> None:
        """Submit a request, for the first time or again."""
        if request.is_closed:
            return
        self._open[request.begin_attempt()] = request
        self._outbound.append(request)
        self._has_work.set()

    def _close(self, request: OpenRequest) -> bool:
        """Forget a request; return whether it was open."""
        request.is_closed = True
        request.leave_call()
        return self._open.pop(request.attempt_id, None) is not None

    def _cancel(self, request: OpenRequest) -> None:
        # A request that no pipeline has taken yet is cancelled when one has, by `_submit`.
        if request.pipeline is not None:
            self._cancels.setdefault(request.pipeline, {})[request.attempt_id] = request.is_stopped
            self._has_work.set()

    async def _send(self) -> None:
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            outbound, self._outbound = self._outbound, []
            cancels, self._cancels = self._cancels, {}
            late, self._late = self._late, {}
            # Each call in a task of its own, so that one without an answer holds up no other.
            calls = [self._submit(requests) for requests in self._divide(outbound)]
            calls += [self._call_cancel(pipeline, attempts) for pipeline, attempts in cancels.items()]
            calls += [self._call_note_late(pipeline, gaps) for pipeline, gaps in late.items()]
            for call in calls:
                task = asyncio.create_task(call)
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)

    def _divide(self, outbound: list[OpenRequest]) -> list[list[OpenRequest]]:
        """Return what is to go in one call each."""
        if self._num_pipelines > 1:
            return group_by_prefix(outbound, lambda request: request.prefix)
        return [outbound] if outbound else []

    async def _submit(self, outbound: list[OpenRequest]) -> None:
        sent = {request.attempt_id: request for request in outbound if request.attempt_id in self._open}
        if not sent:
            return
        try:
            call = Call(self._ingress, next(self._call_numbers))
            for request in sent.values():
                request.join(call)
            answer = self._scheduler.submit.remote(call, [request.submission() for request in sent.values()])
            reply: SubmitReply = await asyncio.wait_for(answer, _SUBMIT_TIMEOUT_S)
        except Exception as error:  # whatever it is, the clients of this call must hear of it, and others be served
            logger.warning("could not submit %d requests: %r", len(sent), error)
            for attempt_id in sent:
                self._retry(attempt_id, f"no pipeline took the request ({type(error).__name__})")
            return
        for attempt_id, request in sent.items():
            refusal = reply.refusals.get(attempt_id)
            if refusal is None and attempt_id in self._open:
                request.settle(reply.pipeline)
            elif refusal is None:
                self._cancels.setdefault(reply.pipeline, {})[attempt_id] = request.is_stopped
                self._has_work.set()
            elif isinstance(refusal, EngineDeadError) or (isinstance(refusal, OverloadedError) and request.was_lost):
                self._retry(attempt_id, str(refusal))
            elif self._open.pop(attempt_id, None) is not None:
                request.fail(refusal)
        if reply.pipeline not in self._streams:
            self._streams[reply.pipeline] = asyncio.create_task(self._read(reply.pipeline))

    async def _read(self, pipeline: str) -> None:
        """Hand out the outputs of a pipeline while requests are open there."""
        try:
            while open_before := self._open_at(pipeline):
                outputs: Any = self._scheduler.options(stream=True).outputs
                stream: AsyncIterator[OutputBatch] = outputs.remote(self._ingress, pipeline=pipeline)
                while True:
                    async with asyncio.timeout(_SILENCE_S):
                        batch = await anext(stream, None)
                    if batch is None:
                        break
                    self._num_waiting = batch.num_waiting
                    self._num_since_report = 0
                    self._deliver(batch.outputs)
                # A stream ends when the scheduler has no request of ours: those from before it have ended or are lost.
                self._lose(open_before, "the pipeline has lost the request")
        except Exception as error:  # whatever it is, who reads from this pipeline must hear of it
            lost = self._open_at(pipeline)
            logger.warning("pipeline %s is gone with %d requests: %r", pipeline, len(lost), error)
            self._lose(lost, "the pipeline died")
        finally:
            del self._streams[pipeline]

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            request = self._open.get(output.request_id)
            if request is None:
                continue
            if output.finish_reason is FinishReason.LOST:
                del self._open[output.request_id]
                request.fail(EngineDeadError(output.error))
            else:
                request.put(output)

    def _open_at(self, pipeline: str) -> list[str]:
        return [
            attempt_id
            for attempt_id, request in self._open.items()
            if request.pipeline == pipeline and not request.is_finished
        ]

    def _lose(self, attempt_ids: list[str], error: str) -> None:
        """Take requests from a pipeline that is gone, and submit them again."""
        for attempt_id in attempt_ids:
            request = self._open.get(attempt_id)
            if request is not None and not request.is_finished:
                request.num_losses += 1
                self._retry(attempt_id, error)

    def _retry(self, attempt_id: str, error: str) -> None:
        request = self._open.pop(attempt_id, None)
        if request is None:
            return
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        has_waited = now_s - request.waits_since(now_s) > self._pipeline_timeout_s or self._placement.is_overdue
        if request.num_losses > _MAX_LOSSES or has_waited:
            request.fail(EngineDeadError(self._placement.explanation or error))
        else:
            loop.call_later(_RETRY_S, self._dispatch, request)

    async def _call_cancel(self, pipeline: str, attempts: dict[str, bool]) -> None:
        attempt_ids = list(attempts)
        stopped_ids = {attempt_id for attempt_id, is_stopped in attempts.items() if is_stopped}
        try:
            call = self._scheduler.cancel.remote(attempt_ids, pipeline=pipeline, stopped_ids=stopped_ids)
            await asyncio.wait_for(call, _CONTROL_TIMEOUT_S)
        except Exception as error:
            # Not lost: the next claims do not name these requests, so the scheduler aborts them.
            logger.warning("could not cancel %d requests at pipeline %s: %s", len(attempt_ids), pipeline, error)

    async def _call_note_late(self, pipeline: str, gaps: list[tuple[str, LateGap]]) -> None:
        try:
            await asyncio.wait_for(self._scheduler.note_late.remote(gaps, pipeline=pipeline), _CONTROL_TIMEOUT_S)
        except Exception as error:  # a pipeline that is gone has lost its other counts as well
            logger.warning("%d late tokens are not counted at pipeline %s: %s", len(gaps), pipeline, error)

    async def _claim(self) -> None:
        """Tell every scheduler regularly which requests are still wanted here.

        The first call also sets the handle up, which must not happen within a request: it would end with it.
        """
        while True:
            try:
                await self._ask_all("claim", self._ingress, list(self._open))
            except Exception as error:  # the next claim says the same
                level = logging.WARNING if self._open else logging.DEBUG
                logger.log(level, "could not claim %d open requests: %s", len(self._open), error)
            await asyncio.sleep(_CLAIM_PERIOD_S)

    async def _ask_all(self, method: str, *args: object) -> list[Any]:
        """Return what each scheduler says, or the exception in its place; nothing if there is none."""
        call = self._scheduler.broadcast(method, *args)
        try:
            answers: list[Any] = await call.results_async(timeout_s=_CONTROL_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            answers = []
        except _CALL_ERRORS as error:
            raise EngineDeadError(f"no pipeline answers ({type(error).__name__})") from error
        self._num_pipelines = len(answers)
        return answers

    async def _call_control(self, call: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(call, _CONTROL_TIMEOUT_S)
        except SarathiError:
            raise
        except _CALL_ERRORS as error:
            raise EngineDeadError(f"no pipeline answers ({type(error).__name__})") from error
