"""The scheduler actors as an engine client: submit, read one stream of outputs per pipeline, cancel."""

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rayserve_sarathi.actors.messages import OutputBatch, Submission, SubmitReply
from rayserve_sarathi.engine import Mailboxes
from rayserve_sarathi.errors import EngineDeadError, SarathiError
from rayserve_sarathi.metrics import Snapshot, render
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

_SUBMIT_TIMEOUT_S = 10.0
_CONTROL_TIMEOUT_S = 5.0
_CLAIM_PERIOD_S = 5.0
_SILENCE_S = 30.0
"""A stream of outputs shows every second that it is alive; if it does not for this long, its pipeline is lost."""
_CALL_ERRORS = (RayError, RayServeException, TimeoutError)


class RemoteEngine:
    """See `openai.engine_client.EngineClient`.

    Submissions of one moment travel in one call. Outputs of all requests at a pipeline come back through one stream,
    open while there are any.

    Args:
        scheduler: Handle of the scheduler deployment.
        ingress: Name of this ingress, different from all others.
        max_num_waiting: Size of a scheduler's queue.
    """

    def __init__(self, scheduler: DeploymentHandle[Any], *, ingress: str, max_num_waiting: int) -> None:
        self._scheduler = scheduler
        self._ingress = ingress
        self._max_num_waiting = max_num_waiting
        self._mailboxes = Mailboxes()
        self._pipeline_of: dict[str, str] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._outbound: list[tuple[Submission, asyncio.Future[None]]] = []
        self._cancels: dict[str, list[str]] = {}
        self._stopped: set[str] = set()
        """Those among `_cancels` whose text is complete."""
        self._has_work = asyncio.Event()
        self._num_waiting = 0
        self._num_since_report = 0
        self._calls: set[asyncio.Task[None]] = set()
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._claim())]

    async def check_capacity(self, num_requests: int) -> None:
        """See `EngineClient`. Asks the scheduler only if its queue might be full by what is known here."""
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
        submission = Submission(
            request_id=request_id,
            prompt_token_ids=array("i", prompt_token_ids),
            sampling=sampling,
            cache_salt=cache_salt,
        )
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._mailboxes.open(request_id)
        self._outbound.append((submission, accepted))
        self._has_work.set()
        try:
            await accepted
            async for output in self._mailboxes.read(request_id):
                yield output
        finally:
            if self._mailboxes.close(request_id):
                self._cancel(request_id)
            self._pipeline_of.pop(request_id, None)

    def finish(self, request_id: str) -> None:
        """See `EngineClient`."""
        if self._mailboxes.close(request_id):
            self._stopped.add(request_id)
            self._cancel(request_id)

    async def check_ready(self) -> None:
        """See `EngineClient`."""
        self.check_health()
        await self._call_control(self._scheduler.check_health.remote())

    def check_health(self) -> None:
        """Raise EngineDeadError if a loop of this object has ended, which only a bug of ours makes them do."""
        for task in self._tasks:
            if task.done():
                raise EngineDeadError(f"the ingress has lost a loop: {task.exception()!r}")

    async def metrics(self) -> str:
        """See `EngineClient`. One section for each pipeline."""
        call = self._scheduler.broadcast("snapshot").results_async(timeout_s=_CONTROL_TIMEOUT_S, return_exceptions=True)
        answers = await self._call_control(call)
        return render([answer for answer in answers if isinstance(answer, Snapshot)])

    def _cancel(self, request_id: str) -> None:
        # A request that no pipeline has taken yet is cancelled when one has, by `_submit`.
        if (pipeline := self._pipeline_of.get(request_id)) is not None:
            self._cancels.setdefault(pipeline, []).append(request_id)
            self._has_work.set()

    async def _send(self) -> None:
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            outbound, self._outbound = self._outbound, []
            cancels, self._cancels = self._cancels, {}
            # Each call in a task of its own, so that one without an answer holds up no other.
            calls = [self._submit(outbound)] if outbound else []
            calls += [self._call_cancel(pipeline, request_ids) for pipeline, request_ids in cancels.items()]
            for call in calls:
                task = asyncio.create_task(call)
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)

    async def _submit(self, outbound: list[tuple[Submission, "asyncio.Future[None]"]]) -> None:
        wanted = [entry for entry in outbound if entry[0].request_id in self._mailboxes]
        try:
            call = self._scheduler.submit.remote(self._ingress, [submission for submission, _ in wanted])
            reply: SubmitReply = await asyncio.wait_for(call, _SUBMIT_TIMEOUT_S)
        except Exception as error:  # whatever it is, the clients of this call must hear of it, and others be served
            logger.warning("could not submit %d requests", len(wanted), exc_info=error)
            for _, accepted in wanted:
                _resolve(accepted, EngineDeadError(f"no pipeline took the request ({type(error).__name__})"))
            return
        for submission, accepted in wanted:
            request_id = submission.request_id
            refusal = reply.refusals.get(request_id)
            if refusal is None and request_id in self._mailboxes:
                self._pipeline_of[request_id] = reply.pipeline
            elif refusal is None:
                self._cancels.setdefault(reply.pipeline, []).append(request_id)
                self._has_work.set()
            _resolve(accepted, refusal)
        if reply.pipeline not in self._streams:
            self._streams[reply.pipeline] = asyncio.create_task(self._read(reply.pipeline))

    async def _read(self, pipeline: str) -> None:
        """Hand out the outputs of a pipeline while requests are open there."""
        try:
            while open_before := self._open_at(pipeline):
                outputs: Any = self._scheduler.options(stream=True).outputs
                stream: AsyncIterator[OutputBatch] = outputs.remote(self._ingress, pipeline=pipeline)
                while (batch := await asyncio.wait_for(anext(stream, None), _SILENCE_S)) is not None:
                    self._num_waiting = batch.num_waiting
                    self._num_since_report = 0
                    self._mailboxes.deliver(batch.outputs)
                # A stream ends when the scheduler has no request of ours: those from before it have ended or are lost.
                self._fail(open_before, "the pipeline has lost the request")
        except Exception as error:  # whatever it is, who reads from this pipeline must hear of it
            logger.warning("pipeline %s is gone", pipeline, exc_info=error)
            self._fail(self._open_at(pipeline), "the pipeline died")
        finally:
            del self._streams[pipeline]

    def _open_at(self, pipeline: str) -> list[str]:
        return [request_id for request_id, name in self._pipeline_of.items() if name == pipeline]

    def _fail(self, request_ids: list[str], error: str) -> None:
        """End requests; of one that has ended already and is not yet read to its end, nothing more is read."""
        for request_id in request_ids:
            self._pipeline_of.pop(request_id, None)
        self._mailboxes.deliver(
            RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error) for request_id in request_ids
        )

    async def _call_cancel(self, pipeline: str, request_ids: list[str]) -> None:
        stopped_ids = self._stopped.intersection(request_ids)
        self._stopped -= stopped_ids
        try:
            call = self._scheduler.cancel.remote(request_ids, pipeline=pipeline, stopped_ids=stopped_ids)
            await asyncio.wait_for(call, _CONTROL_TIMEOUT_S)
        except Exception as error:
            # Not lost: the next claims do not name these requests, so the scheduler aborts them.
            logger.warning("could not cancel %d requests at pipeline %s: %s", len(request_ids), pipeline, error)

    async def _claim(self) -> None:
        """Tell every scheduler regularly which requests are still wanted here.

        The first call also sets the handle up, which must not happen within a request: it would end with it.
        """
        while True:
            try:
                await self._scheduler.broadcast("claim", self._ingress, list(self._mailboxes)).results_async(
                    timeout_s=_CONTROL_TIMEOUT_S, return_exceptions=True
                )
            except Exception as error:  # the next claim says the same
                level = logging.WARNING if self._mailboxes else logging.DEBUG
                logger.log(level, "could not claim %d open requests: %s", len(self._mailboxes), error)
            await asyncio.sleep(_CLAIM_PERIOD_S)

    async def _call_control(self, call: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(call, _CONTROL_TIMEOUT_S)
        except SarathiError:
            raise
        except _CALL_ERRORS as error:
            raise EngineDeadError(f"no pipeline answers ({type(error).__name__})") from error


def _resolve(accepted: "asyncio.Future[None]", refusal: SarathiError | None) -> None:
    if accepted.done():  # who waited for it is gone
        return
    if refusal is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(refusal)
