"""Run a scheduler on a virtual clock against stages whose step times are known."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.step import StageTiming, StepInput, StepOutput
from rayserve_sarathi.step_shape import StepShape, shape_of

TrueTimes = Callable[[StepShape], Sequence[float]]


@dataclass
class VirtualRun:
    """What came of a run.

    Args:
        gaps_s: Every time between two tokens of a request.
        end_s: When the last request ended.
        num_tokens: Tokens of each step.
    """

    gaps_s: list[float] = field(default_factory=list)
    first_tokens_s: dict[str, float] = field(default_factory=dict)
    num_tokens: list[int] = field(default_factory=list)
    end_s: float = 0.0

    def gap_quantile_s(self, quantile: float) -> float:
        """Return that quantile of the gaps."""
        return float(np.quantile(self.gaps_s, quantile))


def run_virtually(scheduler: Scheduler, requests: Sequence[Request], times_s: TrueTimes) -> VirtualRun:
    """Run until all `requests`, which are in order of arrival, have ended.

    Args:
        scheduler: Without requests.
        requests: Each joins at its `arrival_s`.
        times_s: How long each stage takes for a step.
    """
    run = VirtualRun()
    arriving = deque(requests)
    in_flight: deque[tuple[StepInput, list[StageTiming]]] = deque()
    free_s: list[float] = []
    last_token_s: dict[str, float] = {}
    now_s = 0.0
    while arriving or in_flight or scheduler.has_unfinished_requests:
        while arriving and arriving[0].arrival_s <= now_s:
            scheduler.add(arriving.popleft())
        while (step := scheduler.schedule(now_s)) is not None:
            run.num_tokens.append(step.num_tokens)
            times = times_s(shape_of(step))
            free_s = free_s or [0.0] * len(times)
            in_flight.append((step, _pass_stages(now_s, times, free_s)))
        back_s = in_flight[0][1][-1].end_s if in_flight else np.inf
        next_s = min(arriving[0].arrival_s if arriving else np.inf, scheduler.ahead_due_s)
        if now_s < next_s < back_s:
            now_s = next_s
            continue
        step, timings = in_flight.popleft()
        now_s = back_s
        output = StepOutput(
            step_id=step.step_id,
            epoch=step.epoch,
            token_ids=np.zeros(len(step.sample_requests), dtype=np.int32),
            timings=tuple(timings),
        )
        for result in scheduler.update(output, now_s):
            if result.token_ids and result.request_id in last_token_s:
                run.gaps_s.append(now_s - last_token_s[result.request_id])
            elif result.token_ids:
                run.first_tokens_s[result.request_id] = now_s
            last_token_s[result.request_id] = now_s
    run.end_s = now_s
    return run


def _pass_stages(now_s: float, times_s: Sequence[float], free_s: list[float]) -> list[StageTiming]:
    timings = []
    receive_s = now_s
    for stage, time_s in enumerate(times_s):
        start_s = max(receive_s, free_s[stage])
        free_s[stage] = start_s + time_s
        timings.append(StageTiming(stage=stage, receive_s=receive_s, start_s=start_s, end_s=free_s[stage]))
        receive_s = free_s[stage]
    return timings
