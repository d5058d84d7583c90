"""The loop that joins a scheduler and a pipeline, and the engine for callers in the same process."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import EngineDeadError, InvalidRequestError
from rayserve_sarathi.execution.pipeline import Pipeline
from rayserve_sarathi.kernels.attention import ATTENTION_BACKENDS
from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.metrics import Snapshot, render
from rayserve_sarathi.models.resolve import ModelInfo
from rayserve_sarathi.registry import check_name, load
from rayserve_sarathi.request import FinishReason, Request, RequestOutput, SamplingParams
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.scheduling.base import Scheduler

logger = logging.getLogger(__name__)

Deliver = Callable[[list[RequestOutput]], None]

_MAX_FAILED_STEPS = 8
"""A single bad step fails its own requests; so many in a row mean that the pipeline is broken."""


def max_steps_in_flight(num_stages: int) -> int:
    """Return how many steps to keep in flight: one a stage, and one that waits so that no stage does.

    With a single stage, one: a second would hold no decode (those are in the first), only delay the next ones.
    """
    return 1 if num_stages == 1 else num_stages + 1


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
    blocks = BlockManager(
        num_blocks,
        block_size=config.block_size,
        watermark=config.scheduler.watermark,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    scheduler: Scheduler = load("scheduler policy", config.scheduler.policy, SCHEDULERS)(
        config.scheduler,
        blocks,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        max_steps_in_flight=max_steps_in_flight(config.pipeline_parallel_size),
        num_decode_groups=config.pipeline_parallel_size,
    )
    return scheduler


class Engine:
    """Submit steps while there is something to compute, take their results, hand out what came of them.

    Args:
        scheduler: Taken over; nobody else calls it.
        pipeline: Taken over likewise.
        deliver: Called once a step with what it did for its requests.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        *,
        deliver: Deliver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._deliver = deliver
        self._clock = clock
        self._wake = asyncio.Event()
        self._fault: str | None = None

    def check_capacity(self, num_requests: int) -> None:
        """Return if the queue has room.

        Raises:
            OverloadedError: It has not.
            EngineDeadError: The pipeline is dead.
        """
        self._check_alive()
        self._scheduler.check_capacity(num_requests, self._clock())

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_token_ids: Iterable[int] = (),
        cache_salt: str = "",
    ) -> None:
        """Queue a request; `deliver` gets its tokens.

        Raises:
            InvalidRequestError: It can never be served.
            OverloadedError: The queue is full.
            EngineDeadError: The pipeline is dead.
        """
        self._check_alive()
        self._scheduler.add(
            Request(
                request_id,
                prompt_token_ids,
                sampling,
                eos_token_ids=eos_token_ids,
                cache_salt=cache_salt,
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
        """Run until cancelled, or until the pipeline fails.

        Raises:
            EngineDeadError: The pipeline failed; every open request was told.
        """
        submitting = asyncio.create_task(self._submit_steps())
        try:
            await self._receive_steps(submitting)
        except asyncio.CancelledError:
            self._die("the engine was stopped")
            raise
        except Exception as error:  # the outermost frame of the loop: whoever waits for tokens must hear of it
            logger.exception("the engine stops")
            fault = str(error) if isinstance(error, EngineDeadError) else f"internal error ({type(error).__name__})"
            self._die(fault)
            raise EngineDeadError(fault) from error
        finally:
            submitting.cancel()

    async def check_health(self) -> None:
        """Return if the pipeline lives.

        Raises:
            EngineDeadError: It does not.
        """
        self._check_alive()
        await self._pipeline.check_health()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their first step."""
        return self._scheduler.num_waiting

    def snapshot(self, *, model_name: str, pipeline: str) -> Snapshot:
        """Return the scheduler's metrics as they are now."""
        scheduler = self._scheduler
        return Snapshot(model_name=model_name, pipeline=pipeline, metrics=scheduler.metrics, state=scheduler.state())

    async def _submit_steps(self) -> None:
        while True:
            self._wake.clear()
            while (step := self._scheduler.schedule(self._clock())) is not None:
                await self._pipeline.submit(step)
            await self._wake.wait()

    async def _receive_steps(self, submitting: "asyncio.Task[None]") -> None:
        num_failures = 0
        while True:
            receiving = asyncio.ensure_future(self._pipeline.receive())
            try:
                await asyncio.wait((receiving, submitting), return_when=asyncio.FIRST_COMPLETED)
                if submitting.done():
                    submitting.result()  # it ends only by an error
                step_output = receiving.result()
            finally:
                receiving.cancel()
            outputs = self._scheduler.update(step_output, self._clock())
            self._wake.set()
            if outputs:
                self._deliver(outputs)
            num_failures = 0 if step_output.error is None else num_failures + 1
            if num_failures >= _MAX_FAILED_STEPS:
                raise EngineDeadError(f"{num_failures} steps in a row failed; the last one: {step_output.error}")

    def _die(self, fault: str) -> None:
        self._fault = fault
        self._deliver(self._scheduler.fail_all(fault))

    def _check_alive(self) -> None:
        if self._fault is not None:
            raise EngineDeadError(self._fault)


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
        self._engine = Engine(scheduler, pipeline, deliver=self._mailboxes.deliver)
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
                yield output
        finally:
            if self._mailboxes.close(request_id):
                self._engine.abort(request_id)

    def finish(self, request_id: str) -> None:
        """See `EngineClient`."""
        if self._mailboxes.close(request_id):
            self._engine.stop(request_id)

    async def check_ready(self) -> None:
        """See `EngineClient`."""
        await self._engine.check_health()

    async def metrics(self) -> str:
        """See `EngineClient`."""
        return render([self._engine.snapshot(model_name=self._model_name, pipeline="0")])
