"""A step-time model for tests, and a simulation in the plainest way."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from rayserve_sarathi.request import Request, SamplingParams
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.simulation.virtual_pipeline import ModelledPipeline
from rayserve_sarathi.simulation.workload import Workload
from rayserve_sarathi.step import StepInput, StepOutput
from rayserve_sarathi.step_shape import StepShape, shape_of


@dataclass
class LinearTimes:
    """Time grows with the tokens and the context; stage s takes s + 1 times as long as stage 0."""

    num_stages: int = 1
    base_s: float = 0.002
    token_s: float = 0.00007
    context_s: float = 1e-8
    transfer: float = 0.001
    cpu: float = 0.0005

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        context = shape.decode_context_tokens + sum(query * (before + query / 2) for query, before in shape.chunks)
        first_s = self.base_s + self.token_s * shape.num_tokens + self.context_s * context
        return tuple(first_s * (stage + 1) for stage in range(self.num_stages))

    def transfer_s(self, shape: StepShape) -> float:
        return self.transfer

    def cpu_s(self, shape: StepShape) -> float:
        return self.cpu


def make_workload_of(*requests: tuple[float, int, int]) -> Workload:
    """Make a workload of (arrival, prompt tokens, output tokens)."""
    arrivals_s, prompts, outputs = zip(*requests, strict=True)
    return Workload(
        arrivals_s=np.array(arrivals_s, dtype=np.float64),
        num_prompt_tokens=np.array(prompts, dtype=np.int64),
        num_output_tokens=np.array(outputs, dtype=np.int64),
        rate=1.0,
    )


@dataclass
class PlainRun:
    """The engine's rules, one step after another, with the messages that stages would get."""

    steps: list[StepInput] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    first_scheduled_s: dict[int, float] = field(default_factory=dict)
    token_times_s: dict[int, list[float]] = field(default_factory=dict)
    num_preemptions: dict[int, int] = field(default_factory=dict)

    def run(self, workload: Workload, scheduler: Scheduler, pipeline: ModelledPipeline) -> None:
        requests = [
            Request(str(index), [0] * prompt, SamplingParams(max_tokens=output, ignore_eos=True), arrival_s=arrival_s)
            for index, (arrival_s, prompt, output) in enumerate(
                zip(
                    workload.arrivals_s.tolist(),
                    workload.num_prompt_tokens.tolist(),
                    workload.num_output_tokens.tolist(),
                    strict=True,
                )
            )
        ]
        waiting = deque(requests)
        in_flight: deque[tuple[StepOutput, float]] = deque()
        now_s = 0.0
        while waiting or scheduler.has_unfinished_requests:
            while waiting and waiting[0].arrival_s <= now_s:
                scheduler.add(waiting.popleft())
            while (step := scheduler.schedule(now_s)) is not None:
                self.steps.append(step)
                _, back_s = pipeline.submit(shape_of(step), now_s)
                tokens = np.zeros(len(step.sample_requests), dtype=np.int32)
                output = StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=tokens)
                in_flight.append((output, back_s))
            events = [back_s for _, back_s in list(in_flight)[:1]] + [
                request.arrival_s for request in list(waiting)[:1]
            ]
            now_s = min(events)
            if in_flight and in_flight[0][1] == now_s:
                for output in scheduler.update(in_flight.popleft()[0], now_s):
                    times_s = self.token_times_s.setdefault(int(output.request_id), [])
                    if times_s:
                        self.gaps_s.append(now_s - times_s[-1])
                    times_s.append(now_s)
        for index, request in enumerate(requests):
            assert request.first_scheduled_s is not None
            self.first_scheduled_s[index] = request.first_scheduled_s
            self.num_preemptions[index] = request.num_preemptions
