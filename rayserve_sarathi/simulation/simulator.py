"""A virtual clock around the scheduler that serves: the same class, the same blocks, the same steps in flight.

Only the stages are simulated, as a `VirtualPipeline`, and what they sample: requests run to their output length, and
all their tokens are 0. The engine's rules hold: whenever a request arrives or a step returns, steps are made as long as
one more may be in flight. What returns and what arrives at the same moment is there before the next step is made.

Steps that are alike (`Scheduler.num_alike`) are taken together, which changes nothing but the time that it takes.
"""

import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

import numpy as np

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.request import Request, RequestOutput, SamplingParams
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.scheduling.build import build_scheduler
from rayserve_sarathi.scheduling.plan import StepPlan, next_alike
from rayserve_sarathi.simulation.criteria import Criteria, Watch
from rayserve_sarathi.simulation.gaps import GapLog
from rayserve_sarathi.simulation.records import RequestRecords, StageClock
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.virtual_pipeline import Passage, VirtualPipeline
from rayserve_sarathi.simulation.workload import Workload
from rayserve_sarathi.step import StageTiming, StepOutput
from rayserve_sarathi.step_shape import StepShape, StepTimeModel

NoteStep = Callable[[StepPlan, float, Passage, float], None]
"""Hears of each step: what is in it, when it was made, when each stage had it, and when it was back."""


def make_simulated_scheduler(
    config: SchedulerConfig,
    *,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    num_stages: int,
    enable_prefix_caching: bool = False,
    slo: SloConfig | None = None,
    prior: StepTimeModel | None = None,
) -> Scheduler:
    """Build the scheduler that an engine of `num_stages` would have, but with a queue that never refuses a request.

    Raises:
        ConfigError: There is no such policy, or the blocks do not hold a request of `max_model_len` tokens.
    """
    if num_blocks * block_size < max_model_len:
        raise ConfigError(
            f"{num_blocks} KV blocks of {block_size} tokens cannot hold a request of max_model_len={max_model_len};"
            " give more memory or a smaller max_model_len"
        )
    return build_scheduler(
        replace(config, max_num_waiting=sys.maxsize),
        num_blocks=num_blocks,
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
        max_model_len=max_model_len,
        vocab_size=1,
        num_stages=num_stages,
        slo=slo,
        prior=prior,
    )


def simulate(
    workload: Workload,
    scheduler: Scheduler,
    pipeline: VirtualPipeline,
    *,
    give_up: Criteria | None = None,
    keeps_token_times: bool = False,
    note_step: NoteStep | None = None,
) -> SimulationResult:
    """Run all requests of `workload` to their end.

    Args:
        workload: The requests.
        scheduler: Taken over; it has none yet.
        pipeline: Taken over.
        give_up: End as soon as it is certain that the run will not meet these; None runs to the end.
        keeps_token_times: Whether to keep the time of every token of each request, 8 bytes a token.
        note_step: Called for each step as it is submitted, for timelines and comparisons.

    Raises:
        ContextLengthError: A request is longer than the scheduler's `max_model_len`.
    """
    records = RequestRecords(len(workload), keeps_token_times=keeps_token_times)
    return _Run(workload, scheduler, pipeline, give_up, records, note_step).run()


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step, or several that are alike one after the other, and when they are back."""

    plan: StepPlan
    ends_s: list[float]
    passage: Passage


class _Run:
    def __init__(
        self,
        workload: Workload,
        scheduler: Scheduler,
        pipeline: VirtualPipeline,
        give_up: Criteria | None,
        records: RequestRecords,
        note_step: NoteStep | None,
    ) -> None:
        assert not scheduler.has_unfinished_requests, "the scheduler has requests of its own"
        self._workload = workload
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._arrivals_s: list[float] = workload.arrivals_s.tolist()
        self._nums_prompt: list[int] = workload.num_prompt_tokens.tolist()
        self._nums_output: list[int] = workload.num_output_tokens.tolist()
        self._watch = None
        if give_up is not None:
            self._watch = Watch(give_up, self._arrivals_s, sum(self._nums_output) - len(workload))
        self._gaps = GapLog(inf if give_up is None else give_up.p99_tbt_s)
        scheduler.metrics.inter_token_latency_s = self._gaps
        self._num_added = 0
        self._open: dict[str, Request] = {}
        self._in_flight: deque[_Flight] = deque()
        self._records = records
        self._note_step = note_step
        self._stages = StageClock(pipeline.num_stages)
        self._num_steps = 0
        self._num_batched_tokens = 0

    def run(self) -> SimulationResult:
        now_s = self._arrivals_s[0]
        is_hopeless = False
        while not is_hopeless:
            while self._next_arrival_s() <= now_s:
                self._add_next()
            while (plan := self._scheduler.plan(now_s)) is not None:
                self._submit(plan, now_s)
            back_s = self._in_flight[0].ends_s[-1] if self._in_flight else inf
            arrival_s = self._next_arrival_s()
            if back_s == arrival_s == inf:
                break
            now_s = min(back_s, arrival_s)
            if back_s <= arrival_s:
                self._land(self._in_flight.popleft())
                is_hopeless = self._watch is not None and self._watch.is_hopeless(self._gaps.num_above, now_s)
        assert is_hopeless or not self._open, f"{len(self._open)} requests are never scheduled"
        return self._result(duration_s=now_s - self._arrivals_s[0])

    def _next_arrival_s(self) -> float:
        return self._arrivals_s[self._num_added] if self._num_added < len(self._arrivals_s) else inf

    def _add_next(self) -> None:
        index = self._num_added
        self._num_added += 1
        request = Request(
            str(index),
            _zeros(self._nums_prompt[index]),
            _sampling(self._nums_output[index]),
            arrival_s=self._arrivals_s[index],
        )
        self._scheduler.add(request)
        self._open[request.request_id] = request

    def _submit(self, plan: StepPlan, now_s: float) -> None:
        if self._watch is not None:
            self._watch.note_plan(plan, now_s)
        shape = plan.shape()
        passage, back_s = self._pass_stages(plan, shape, now_s)
        ends_s = [back_s]
        num_alike = self._scheduler.num_alike(plan) if self._scheduler.can_advance else 1
        if num_alike > 1:
            # Who comes before the last of them is made may be in the next step, or has to wait for a later one.
            limit_s = self._next_arrival_s() if self._scheduler.can_admit_new(plan) else inf
            while len(ends_s) < num_alike and back_s < limit_s:
                shape = next_alike(shape)
                _, back_s = self._pass_stages(plan, shape, back_s)
                ends_s.append(back_s)
        self._num_steps += len(ends_s)
        self._num_batched_tokens += plan.num_tokens * len(ends_s)
        self._in_flight.append(_Flight(plan, ends_s, passage))

    def _pass_stages(self, plan: StepPlan, shape: StepShape, submit_s: float) -> tuple[Passage, float]:
        passage, back_s = self._pipeline.submit(shape, submit_s)
        self._stages.note(passage, submit_s=submit_s, back_s=back_s)
        if self._note_step is not None:
            self._note_step(plan, submit_s, passage, back_s)
        return passage, back_s

    def _land(self, flight: _Flight) -> None:
        plan, ends_s = flight.plan, flight.ends_s
        self._records.note_tokens(plan, ends_s)
        outputs: Iterable[RequestOutput]
        if self._scheduler.can_advance:
            outputs = self._scheduler.advance(ends_s)
        else:
            num_samples = len(plan.decodes) + len(plan.sampled_prefills)
            token_ids = np.zeros(num_samples, dtype=np.int32)
            step_output = StepOutput(
                step_id=plan.step_id,
                epoch=self._scheduler.epoch,
                token_ids=token_ids,
                timings=tuple(
                    StageTiming(stage=stage, receive_s=receive_s, start_s=start_s, end_s=end_s)
                    for stage, (receive_s, start_s, end_s) in enumerate(flight.passage)
                ),
            )
            outputs = self._scheduler.update(step_output, ends_s[-1])
        for output in outputs:
            if output.finish_reason is not None:
                self._records.note_end(self._open.pop(output.request_id), ends_s[-1])

    def _result(self, *, duration_s: float) -> SimulationResult:
        records, workload = self._records, self._workload
        ended = np.flatnonzero(~np.isnan(records.ends_s))
        return SimulationResult(
            arrivals_s=workload.arrivals_s[ended],
            first_scheduled_s=records.first_scheduled_s[ended],
            first_tokens_s=records.first_tokens_s[ended],
            ends_s=records.ends_s[ended],
            num_prompt_tokens=workload.num_prompt_tokens[ended],
            num_output_tokens=workload.num_output_tokens[ended],
            num_preemptions=records.num_preemptions[ended],
            gaps=self._gaps.gaps(),
            stages=self._stages.uses(),
            num_steps=self._num_steps,
            num_batched_tokens=self._num_batched_tokens,
            duration_s=duration_s,
            is_complete=len(ended) == len(workload),
            token_times_s=records.token_times_s(),
        )


@lru_cache(maxsize=4096)
def _sampling(num_output_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_output_tokens, ignore_eos=True)


def _zeros(num_tokens: int) -> "array[int]":
    return array("i", bytes(4 * num_tokens))
