"""When steps will come back: their times as learnt, the steps before them, and a margin for what cannot be foreseen.

Steps pass the stages one behind another, and are nearly alike (that is what a token budget is for). So a step leaves
the last stage its own period after the step before it, or after all its stages if nothing was in its way.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rayserve_sarathi.scheduling.step_time import FittedStepTime, StepLoad
from rayserve_sarathi.step import StageTiming

_FIRST_MARGIN = 1.1
_MIN_MARGIN, _MAX_MARGIN = 0.9, 4.0
_MARGIN_RATE = 0.02
"""By how much a step that takes too long raises the margin."""
_NUM_LEARNING = 16
"""Steps whose errors say more about the prior than about the device."""
_CLOSE = 0.5
"""A step counts for the margin if it was expected to take this share of the target: of others no token comes late."""


@dataclass(eq=False, slots=True)
class ExpectedStep:
    """A step in flight.

    Args:
        load: What is in it.
        decodes_s: Period that its decodes alone would have.
        period_s: Time it was expected to keep the slowest stage.
        submit_s: When it was submitted.
        expected_s: Time from there that it was expected to take.
        back_s: When it is expected back, in the light of the steps that came back since.
    """

    load: StepLoad
    decodes_s: float
    period_s: float
    submit_s: float
    expected_s: float
    back_s: float


class StepForecast:
    """Foresees the steps of one pipeline.

    Args:
        step_time: Taken over; learns from the steps.
        num_stages: Of the pipeline.
        tbt_s: Target for the time between tokens; None for none.
        quantile: Share of the steps that are to be within their predicted time times `margin`.
    """

    def __init__(self, step_time: FittedStepTime, *, num_stages: int, tbt_s: float | None, quantile: float) -> None:
        self.step_time = step_time
        self.num_stages = num_stages
        self.margin = _FIRST_MARGIN
        self._close_s = math.inf if tbt_s is None else _CLOSE * tbt_s
        # Half, so that the quantile holds in a sample of steps more often than in every second one.
        self._tail = (1 - quantile) / 2
        self._in_flight: deque[ExpectedStep] = deque()
        self._last_ends_s: tuple[float, ...] = ()
        self._last_back_s = -math.inf
        self._recent_s: deque[float] = deque(maxlen=max(2 * num_stages, 1))

    def free_s(self, now_s: float) -> float:
        """Return when the newest step in flight is expected back; now, if none is."""
        return max(self._in_flight[-1].back_s, now_s) if self._in_flight else now_s

    def longest_period_s(self, now_s: float, *, deadline_s: float) -> float:
        """Return how long the next step may keep its slowest stage so that it is back in time; 0 or less if never."""
        return min(deadline_s - self.free_s(now_s), (deadline_s - now_s) / self.num_stages) / self.margin

    @property
    def is_settled(self) -> bool:
        """Whether predictions say something of the device, rather than of the prior."""
        return self.step_time.num_observed >= _NUM_LEARNING

    @property
    def num_in_flight(self) -> int:
        """Steps that have not come back."""
        return len(self._in_flight)

    @property
    def mean_period_s(self) -> float:
        """Period of the last steps, on average; 0 before the first."""
        return sum(self._recent_s) / len(self._recent_s) if self._recent_s else 0.0

    def submit(self, load: StepLoad, now_s: float) -> None:
        """Note a step that is about to be sent."""
        num_decodes = load.num_decodes
        period_s = self.step_time.predict_s(load)
        # Nearly: the contexts of the chunks are counted in.
        decodes_s = self.step_time.predict_s(StepLoad(num_decodes, num_decodes, load.context_tokens, 0.0))
        back_s = max(self.free_s(now_s), now_s + (self.num_stages - 1) * period_s) + period_s
        self._recent_s.append(period_s)
        self._in_flight.append(ExpectedStep(load, decodes_s, period_s, now_s, back_s - now_s, back_s))

    def land(self, timings: Sequence[StageTiming], now_s: float) -> ExpectedStep:
        """Take note that the oldest step has come back, and learn from it; return it as it was expected."""
        step = self._in_flight.popleft()
        period_s = self._observed_period_s(step, timings, now_s)
        self._last_back_s = now_s
        late_s = now_s - step.back_s
        for other in self._in_flight:
            other.back_s += late_s
        if period_s is not None and period_s > 0:
            self._learn_margin(step, now_s)
            self.step_time.observe(step.load, period_s)
        return step

    def forget(self) -> None:
        """Drop the oldest step, which failed: its time says nothing."""
        self._in_flight.popleft()
        self._last_ends_s = ()

    def restart(self) -> None:
        """Forget the steps in flight: they never come back."""
        self._in_flight.clear()
        self._last_ends_s = ()

    def _observed_period_s(self, step: ExpectedStep, timings: Sequence[StageTiming], now_s: float) -> float | None:
        """Return how long a step kept its slowest stage, None if that cannot be known."""
        if self.num_stages == 1:
            # What a token waits for, the scheduler's own time and the way of the messages with it.
            return now_s - max(step.submit_s, self._last_back_s)
        last_ends_s, self._last_ends_s = self._last_ends_s, tuple([timing.end_s for timing in timings])
        if len(last_ends_s) != len(timings):
            last_ends_s = (-math.inf,) * len(timings)
        return max(
            [timing.end_s - max(timing.receive_s, last_s) for timing, last_s in zip(timings, last_ends_s, strict=True)],
            default=None,
        )

    def _learn_margin(self, step: ExpectedStep, now_s: float) -> None:
        if not self.is_settled or step.expected_s * self.margin < self._close_s:
            return
        is_over = now_s - step.submit_s > step.expected_s * self.margin
        self.margin *= math.exp(_MARGIN_RATE * (is_over - self._tail))
        self.margin = min(max(self.margin, _MIN_MARGIN), _MAX_MARGIN)
