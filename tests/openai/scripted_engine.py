"""An engine that says what it is told to, one token a step, and remembers what became of its requests."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from rayserve_sarathi.errors import SarathiError
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport
from rayserve_sarathi.step_log import PipelineTrace, StepRecord

TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One call of `generate`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    cache_salt: str


@dataclass(eq=False)
class ScriptedEngine:
    """See the module.

    Args:
        token_ids: What every request yields; repeated if `max_tokens` is more.
        ends: Whether the last of `token_ids` ends a request, as an end-of-sequence token does.
        hangs_after: Number of tokens after which a request goes on for ever without a further one.
        fails_after: Number of tokens after which a request fails.
        tokens_per_output: How many tokens a step yields.
        num_cached_tokens: Prompt tokens that were cached.
    """

    token_ids: Sequence[int] = ()
    ends: bool = False
    hangs_after: int | None = None
    fails_after: int | None = None
    raises: BaseException | None = None
    tokens_per_output: int = 1
    num_cached_tokens: int = 0
    capacity_error: SarathiError | None = None
    ready_error: SarathiError | None = None
    asked: list[Asked] = field(default_factory=list)
    capacity_asked: list[int] = field(default_factory=list)
    num_open: int = 0
    """Requests that the engine still works for."""
    num_aborted: int = 0
    finished: list[str] = field(default_factory=list)
    """Requests that the reader ended."""
    tbt_s: float | None = None
    late: list[tuple[str, LateGap]] = field(default_factory=list)
    """What the reader got late."""
    is_hanging: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def check_capacity(self, num_requests: int) -> None:
        self.capacity_asked.append(num_requests)
        if self.capacity_error is not None:
            raise self.capacity_error

    async def check_ready(self) -> None:
        if self.ready_error is not None:
            raise self.ready_error

    def finish(self, request_id: str) -> None:
        self.finished.append(request_id)

    def note_late(self, request_id: str, gap: LateGap) -> None:
        self.late.append((request_id, gap))

    async def metrics(self) -> str:
        return "sarathi_num_requests_running 0\n"

    async def trace(self) -> list[PipelineTrace]:
        return [one_step_trace(pipeline) for pipeline in ("a", "b")]

    async def why(self, request_id: str) -> list[LateReport]:
        if request_id != "late":
            return []
        gaps = (LateGap(position=20, gap_s=0.4, cause="prefill", culprit="other-0"),)
        return [LateReport(request_id="late-0", tbt_s=0.1, num_late={"prefill": 1, "bubble": 2}, gaps=gaps)]

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput]:
        self.asked.append(
            Asked(
                request_id=request_id,
                prompt_token_ids=tuple(prompt_token_ids),
                sampling=sampling,
                cache_salt=cache_salt,
            )
        )
        self._count_open(1)
        is_complete = False
        try:
            async for output in self._outputs(request_id, prompt_token_ids, sampling):
                is_complete = output.finish_reason is not None
                yield output
        finally:
            self.num_aborted += not is_complete and request_id not in self.finished
            self._count_open(-1)

    async def wait_for_open(self, number: int) -> None:
        """Wait until the engine works for so many requests."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.num_open != number:
                await self._changed.wait()

    def _count_open(self, change: int) -> None:
        self.num_open += change
        self._changed.set()
        self._changed = asyncio.Event()

    async def _outputs(
        self, request_id: str, prompt: Sequence[int], sampling: SamplingParams
    ) -> AsyncGenerator[RequestOutput]:
        if self.raises is not None:
            raise self.raises
        num_tokens = min(sampling.max_tokens, len(self.token_ids)) if self.ends else sampling.max_tokens
        token_ids = [self.token_ids[place % len(self.token_ids)] for place in range(num_tokens)]
        is_stopped = self.ends and num_tokens == len(self.token_ids)
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            prompt_logprobs = tuple(logprobs_of(token_id, sampling.prompt_logprobs) for token_id in prompt[1:])
        for start in range(0, max(1, num_tokens), self.tokens_per_output):
            if self.hangs_after is not None and start >= self.hangs_after:
                self.is_hanging.set()
                await asyncio.Event().wait()
            if self.fails_after is not None and start >= self.fails_after:
                error = "Traceback: /secret/path"
                yield RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error)
                return
            await asyncio.sleep(0)
            part = tuple(token_ids[start : start + self.tokens_per_output])
            is_last = start + self.tokens_per_output >= num_tokens
            reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
            yield RequestOutput(
                request_id,
                part,
                reason if is_last else None,
                logprobs=_logprobs(part, sampling.logprobs),
                prompt_logprobs=prompt_logprobs if start == 0 else None,
                num_cached_tokens=self.num_cached_tokens,
            )


def one_step_trace(pipeline: str) -> PipelineTrace:
    """A pipeline that has run one step, through two stages."""
    record = StepRecord(
        step_id=7,
        epoch=0,
        num_decodes=1,
        num_prefill_tokens=30,
        request_ids=("request-1", "request-2"),
        submit_s=1.0,
        stages=((1.001, 1.002, 1.010), (1.011, 1.012, 1.020)),
        back_s=1.021,
    )
    return PipelineTrace(pipeline=pipeline, now_s=2.0, records=(record,))


def logprobs_of(token_id: int, num_logprobs: int) -> TokenLogprobs:
    """A token is always the most likely one, at -0.5; the others follow by id."""
    top = tuple(range(token_id, token_id + num_logprobs))
    return TokenLogprobs(token_id, -0.5, top, tuple(-0.5 - place for place in range(num_logprobs)))


def _logprobs(token_ids: Sequence[int], num_logprobs: int | None) -> tuple[TokenLogprobs, ...] | None:
    if num_logprobs is None:
        return None
    return tuple(logprobs_of(token_id, num_logprobs) for token_id in token_ids)
