"""An engine for callers in the same process."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Sequence

from rayserve_sarathi.engine import Engine, RebuildLimit
from rayserve_sarathi.errors import EngineDeadError, InvalidRequestError
from rayserve_sarathi.execution.pipeline import Pipeline
from rayserve_sarathi.metrics import render
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport
from rayserve_sarathi.step_log import PipelineTrace


class Mailboxes:
    """Where the outputs of open requests wait for whoever reads them."""

    def __init__(self) -> None:
        self._boxes: dict[str, asyncio.Queue[RequestOutput]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._boxes

    def __iter__(self) -> "itertools.chain[str]":
        return itertools.chain(self._boxes)

    def __len__(self) -> int:
        return len(self._boxes)

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Put each output into the box of its request; those of closed ones are dropped."""
        for output in outputs:
            if (box := self._boxes.get(output.request_id)) is not None:
                box.put_nowait(output)

    def open(self, request_id: str) -> None:
        """Begin to keep the outputs of a request."""
        self._boxes[request_id] = asyncio.Queue()

    def close(self, request_id: str) -> bool:
        """Stop keeping them; return whether the request was open."""
        return self._boxes.pop(request_id, None) is not None

    async def read(self, request_id: str) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of an open request, and close it after the last."""
        box = self._boxes[request_id]
        while True:
            output = await box.get()
            if output.finish_reason is not None:
                self.close(request_id)
            yield output
            if output.finish_reason is not None:
                return


class LocalEngine:
    """An engine in this process, as its clients see it (`openai.engine_client.EngineClient`).

    Args:
        scheduler: Taken over.
        pipeline: Taken over.
        eos_token_ids: Tokens that end a request.
        model_name: Label of the metrics.
    """

    def __init__(
        self, scheduler: Scheduler, pipeline: Pipeline, *, eos_token_ids: Iterable[int], model_name: str
    ) -> None:
        self._mailboxes = Mailboxes()
        self._pipeline = pipeline
        # What runs in this process dies with it: there is nothing to rebuild.
        no_rebuild = RebuildLimit(0, window_s=1.0)
        self._engine = Engine(scheduler, pipeline, deliver=self._mailboxes.deliver, rebuild_limit=no_rebuild)
        self._eos_token_ids = tuple(eos_token_ids)
        self._model_name = model_name
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "LocalEngine":
        self._task = asyncio.create_task(self._engine.run())
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._pipeline.close()

    async def check_capacity(self, num_requests: int) -> None:
        """See `EngineClient`."""
        self._engine.check_capacity(num_requests)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """See `EngineClient`."""
        if request_id in self._mailboxes:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        self._mailboxes.open(request_id)
        try:
            self._engine.add(
                request_id, prompt_token_ids, sampling, eos_token_ids=self._eos_token_ids, cache_salt=cache_salt
            )
            async for output in self._mailboxes.read(request_id):
                if output.finish_reason is FinishReason.LOST:
                    raise EngineDeadError(output.error)
                yield output
        finally:
            if self._mailboxes.close(request_id):
                self._engine.abort(request_id)

    def finish(self, request_id: str) -> None:
        """See `EngineClient`."""
        if self._mailboxes.close(request_id):
            self._engine.stop(request_id)

    @property
    def tbt_s(self) -> float | None:
        """See `EngineClient`."""
        return self._engine.tbt_s

    def note_late(self, request_id: str, gap: LateGap) -> None:
        """See `EngineClient`."""
        self._engine.note_late(request_id, gap)

    async def check_ready(self) -> None:
        """See `EngineClient`."""
        await self._engine.check_ready()

    async def metrics(self) -> str:
        """See `EngineClient`."""
        return render([self._engine.snapshot(model_name=self._model_name, pipeline="0")])

    async def trace(self) -> list[PipelineTrace]:
        """See `EngineClient`."""
        return [self._engine.trace(pipeline="0")]

    async def why(self, request_id: str) -> list[LateReport]:
        """See `EngineClient`."""
        return self._engine.why(request_id)
