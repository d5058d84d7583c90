"""What came of a simulation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rayserve_sarathi.simulation.gaps import Gaps
from rayserve_sarathi.simulation.workload import Float64Array, Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """Where the time of a stage went.

    Args:
        busy_s: It computed.
        bubble_s: It did not, though at least one step was in flight: what it waits for is the scheduler, another stage,
            or a transfer.
    """

    busy_s: float
    bubble_s: float

    @property
    def bubble_share(self) -> float:
        """Bubble over both."""
        total_s = self.busy_s + self.bubble_s
        return self.bubble_s / total_s if total_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """Times of all requests that ended, in order of arrival, and of the stages. Seconds; arrays are [N].

    Args:
        arrivals_s: When each arrived; `first_scheduled_s`, `first_tokens_s` and `ends_s` likewise.
        num_prompt_tokens: Its prompt.
        num_output_tokens: What it generated.
        num_preemptions: How often it was preempted.
        gaps: Every time between two tokens of a request, preemption included.
        stages: Of each stage.
        num_steps: Steps that were computed.
        num_batched_tokens: Tokens in all steps.
        duration_s: From the first arrival to the end of the last request.
        is_complete: Whether all requests ended; otherwise the run was given up as hopeless.
        token_times_s: When each request got each of its tokens, if that was asked for: by index of the request.
    """

    arrivals_s: Float64Array
    first_scheduled_s: Float64Array
    first_tokens_s: Float64Array
    ends_s: Float64Array
    num_prompt_tokens: Int64Array
    num_output_tokens: Int64Array
    num_preemptions: Int64Array
    gaps: Gaps
    stages: tuple[StageUse, ...]
    num_steps: int
    num_batched_tokens: int
    duration_s: float
    is_complete: bool
    token_times_s: Mapping[int, Float64Array] = field(default_factory=dict)

    @property
    def ttft_s(self) -> Float64Array:
        """Time to first token of each request."""
        return self.first_tokens_s - self.arrivals_s

    @property
    def scheduling_delay_s(self) -> Float64Array:
        """Time that each request waited for its first step."""
        return self.first_scheduled_s - self.arrivals_s

    @property
    def latency_s(self) -> Float64Array:
        """Time from arrival to end of each request."""
        return self.ends_s - self.arrivals_s

    @property
    def normalised_latency_s(self) -> Float64Array:
        """Latency of each request over its output tokens."""
        return self.latency_s / self.num_output_tokens

    @property
    def median_scheduling_delay_s(self) -> float:
        """Half of the requests waited less; infinite if the run was given up."""
        return float(np.median(self.scheduling_delay_s)) if self.is_complete else np.inf

    @property
    def p99_tbt_s(self) -> float:
        """Time between tokens that one of a hundred exceeds."""
        return self.gaps.quantile(0.99)

    @property
    def num_requests(self) -> int:
        """N."""
        return len(self.arrivals_s)
