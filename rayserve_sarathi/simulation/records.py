"""What a simulation notes of its requests and stages while it runs."""

from array import array
from collections.abc import Sequence

import numpy as np

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.plan import StepPlan
from rayserve_sarathi.simulation.result import StageUse
from rayserve_sarathi.simulation.virtual_pipeline import Passage
from rayserve_sarathi.simulation.workload import Float64Array, Int64Array


class RequestRecords:
    """A row for each request that ended; a request's index is its `order`.

    Args:
        num_requests: Rows at most.
        keeps_token_times: Whether to note the time of each token.
    """

    def __init__(self, num_requests: int, *, keeps_token_times: bool) -> None:
        self.first_scheduled_s: Float64Array = np.zeros(num_requests)
        self.first_tokens_s: Float64Array = np.zeros(num_requests)
        self.ends_s: Float64Array = np.full(num_requests, np.nan)
        self.num_preemptions: Int64Array = np.zeros(num_requests, dtype=np.int64)
        self._token_times_s: dict[int, array[float]] | None = {} if keeps_token_times else None

    def note_tokens(self, plan: StepPlan, ends_s: Sequence[float]) -> None:
        """Note that the requests of `plan` that sample got a token at each of `ends_s`."""
        if self._token_times_s is not None:
            for request in (*plan.decodes, *plan.sampled_prefills):
                self._token_times_s.setdefault(request.order, array("d")).extend(ends_s)

    def note_end(self, request: Request, end_s: float) -> None:
        """Note a request that has all its tokens."""
        assert request.first_scheduled_s is not None and request.first_token_s is not None, f"{request} never ran"
        row = request.order
        self.first_scheduled_s[row] = request.first_scheduled_s
        self.first_tokens_s[row] = request.first_token_s
        self.ends_s[row] = end_s
        self.num_preemptions[row] = request.num_preemptions

    def token_times_s(self) -> dict[int, Float64Array]:
        """Return the times of tokens by index; nothing if they were not to be kept."""
        return {row: np.array(times_s) for row, times_s in (self._token_times_s or {}).items()}


class StageClock:
    """Sums up how long each stage computes, and how long any step is in flight.

    Args:
        num_stages: Of the pipeline.
    """

    def __init__(self, num_stages: int) -> None:
        self._busy_s = [0.0] * num_stages
        self._in_flight_s = 0.0
        self._last_back_s = 0.0

    def note(self, passage: Passage, *, submit_s: float, back_s: float) -> None:
        """Note a step, in the order of submission, which is that of return."""
        for stage, (_, start_s, end_s) in enumerate(passage):
            self._busy_s[stage] += end_s - start_s
        self._in_flight_s += back_s - max(submit_s, self._last_back_s)
        self._last_back_s = back_s

    def uses(self) -> tuple[StageUse, ...]:
        """Return the sums of each stage."""
        return tuple(StageUse(busy_s=busy_s, bubble_s=self._in_flight_s - busy_s) for busy_s in self._busy_s)
