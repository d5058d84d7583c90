"""When a run keeps up: the criteria of Sarathi-Serve (OSDI'24, section 5), and how to tell early that one does not."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.scheduling.plan import StepPlan

_QUANTILE = 0.99
_ROUNDING_S = 1e-6


class RunResult(Protocol):
    """What a run is judged by, simulated or real."""

    @property
    def median_scheduling_delay_s(self) -> float:
        """Half of the requests waited less for their first step; where that is not known, what bounds it."""

    @property
    def p99_tbt_s(self) -> float:
        """99 of 100 gaps between two tokens of a request were shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """Limits of a run that keeps up.

    Args:
        p99_tbt_s: Most for the 99th percentile of all times between two tokens.
        median_scheduling_delay_s: Most for the median of the times that requests wait for their first step, which grows
            without end where more requests come than go.

    Raises:
        ConfigError: A limit is not greater than 0.
    """

    p99_tbt_s: float
    median_scheduling_delay_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("p99_tbt_s", "median_scheduling_delay_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)}")

    def are_met(self, result: RunResult) -> bool:
        """Whether the run kept up."""
        return result.median_scheduling_delay_s <= self.median_scheduling_delay_s and result.p99_tbt_s <= self.p99_tbt_s


def most_long_gaps(num_gaps: int) -> int:
    """Return how many of `num_gaps` may be above the limit of their 99th percentile: one more, and that is above it."""
    last = max(num_gaps - 1, 0)
    return last - int(last * _QUANTILE)


class Watch:
    """Tells as soon as it is certain that a run will not meet its criteria, whatever the rest of it brings.

    It is when more than half of all requests have waited too long, or more than a hundredth of all gaps are too long;
    how many of both there will be is known, as requests run to their output length. First come, first served.

    Args:
        criteria: The limits.
        arrivals_s: When the requests come, ascending.
        num_gaps: Gaps between tokens of all requests.
    """

    def __init__(self, criteria: Criteria, arrivals_s: Sequence[float], num_gaps: int) -> None:
        self._delay_s = criteria.median_scheduling_delay_s
        self._arrivals_s = arrivals_s
        # With more above the limit, the value itself or both that it lies between are.
        self._max_num_late = len(arrivals_s) // 2
        self._max_num_long = most_long_gaps(num_gaps)
        self._num_scheduled = 0
        self._num_late = 0

    def note_plan(self, plan: StepPlan, now_s: float) -> None:
        """Hear which requests a step begins, if any: their `order` is above that of all before."""
        for request in plan.prefills:
            if request.order >= self._num_scheduled:
                self._num_scheduled = request.order + 1
                self._num_late += now_s - request.arrival_s > self._delay_s

    def is_hopeless(self, num_long_gaps: int, now_s: float) -> bool:
        """Whether it is certain now.

        Args:
            num_long_gaps: Gaps above `Criteria.p99_tbt_s` so far.
            now_s: The time.
        """
        num_due = bisect_left(self._arrivals_s, now_s - self._delay_s - _ROUNDING_S)
        num_late = self._num_late + max(num_due - self._num_scheduled, 0)
        return num_late > self._max_num_late or num_long_gaps > self._max_num_long
