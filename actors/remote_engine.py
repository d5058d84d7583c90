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
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams

logger = logging.getLogger(__name__)

_SUBMIT_TIMEOUT_S = 60.0
_CONTROL_TIMEOUT_S = 5.0
_CLAIM_PERIOD_S = 5.0
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
        self._has_work = asyncio.Event()
        self._num_waiting = 0
        self._num_since_report = 0
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

    async def check_ready(self) -> None:
        """See `EngineClient`."""
        await self._call_control(self._scheduler.check_health.remote())

    async def metrics(self) -> str:
        """See `EngineClient`. One section for each pipeline."""
        texts = await self._call_control(
            self._scheduler.broadcast("render_metrics").results_async(timeout_s=_CONTROL_TIMEOUT_S)
        )
        return "".join(texts)

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
            await asyncio.gather(
                self._submit(outbound),
                *(self._call_cancel(pipeline, request_ids) for pipeline, request_ids in cancels.items()),
            )

    async def _submit(self, outbound: list[tuple[Submission, "asyncio.Future[None]"]]) -> None:
        wanted = [
            (submission, accepted) for submission, accepted in outbound if submission.request_id in self._mailboxes
        ]
        if not wanted:
            return
        try:
            call = self._scheduler.submit.remote(self._ingress, [submission for submission, _ in wanted])
            reply: SubmitReply = await asyncio.wait_for(call, _SUBMIT_TIMEOUT_S)
        except _CALL_ERRORS as error:
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
            while pipeline in self._pipeline_of.values():
                outputs: Any = self._scheduler.options(stream=True).outputs
                batch: OutputBatch
                async for batch in outputs.remote(self._ingress, pipeline=pipeline):
                    self._num_waiting = batch.num_waiting
                    self._num_since_report = 0
                    self._mailboxes.deliver(batch.outputs)
        except _CALL_ERRORS as error:
            logger.warning("pipeline %s is gone: %s", pipeline, error)
            lost = [request_id for request_id, name in self._pipeline_of.items() if name == pipeline]
            self._mailboxes.deliver(
                RequestOutput(request_id, finish_reason=FinishReason.ERROR, error="the pipeline died")
                for request_id in lost
            )
        finally:
            del self._streams[pipeline]

    async def _call_cancel(self, pipeline: str, request_ids: list[str]) -> None:
        try:
            await asyncio.wait_for(self._scheduler.cancel.remote(request_ids, pipeline=pipeline), _CONTROL_TIMEOUT_S)
        except _CALL_ERRORS as error:
            # Not lost: the next claims do not name these requests, so the scheduler aborts them.
            logger.warning("could not cancel %d requests at pipeline %s: %s", len(request_ids), pipeline, error)

    async def _claim(self) -> None:
        """Tell every scheduler regularly which requests are still wanted here."""
        while True:
            await asyncio.sleep(_CLAIM_PERIOD_S)
            try:
                await self._scheduler.broadcast("claim", self._ingress, list(self._mailboxes)).results_async(
                    timeout_s=_CONTROL_TIMEOUT_S, return_exceptions=True
                )
            except _CALL_ERRORS as error:
                logger.warning("could not claim the open requests: %s", error)

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
