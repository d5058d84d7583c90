"""Where the time of each pipeline stage goes: computing, messages, or waiting though there is work.

The clocks of two processes may differ by any amount. So only durations are used here, each between two readings of
one clock. For step n, the scheduler reads `submit` and `back`, and each stage `receive`, `start` and `end`. Steps pass
each stage in the order in which they were submitted.

- **Busy**, of a stage: the sum of `end - start`.
- **Wait** for step n, of a stage: `receive - end of step n-1`, less the time in which no step at all was in flight,
  `submit - back of step n-1`; neither less than 0. So a pipeline without requests waits for nothing. The wait for the
  first step is what the stages before this one took for it.
- **Hop**: how long a message is known to take from one process to the next, at least: the least
  `(back - submit - sum of (end - receive) over the stages) / (number of stages + 1)` of any step of this epoch. Waiting
  in a queue makes a step's own figure larger, and the least one is of a step that did not wait.
- **Comm**, of a stage: the sum of `min(wait, hop)`, as much of the wait as was the message's way, and of
  `start - max(receive, end of step n-1)`, from when it had the message and its hands free until it could compute
  (unpacking, copies to a device, waiting for tensors).
- **Bubble**, of a stage: the sum of what is left of the waits. The way of a large message beyond a hop is in it.

So at the end of each of its steps, busy + comm + bubble of a stage is the time since the first submit in which at least
one step was in flight. What a stage waits after its last step, while the others drain, counts with the next one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rayserve_sarathi.step import StageTiming

_RECENT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTotals:
    """What became of a stage's time since the start.

    Args:
        busy_s: See the module, as for `comm_s` and `bubble_s`.
        recent_bubble_share: Bubble over all three, of the last 10 to 20 seconds.
    """

    busy_s: float
    comm_s: float
    bubble_s: float
    recent_bubble_share: float


class StageTimes:
    """Sums up the steps of one pipeline, in the order in which they come back."""

    def __init__(self) -> None:
        self._stages: list[_Stage] = []
        self._last_back_s = math.inf
        self._hop_s = math.inf

    def add(self, timings: Sequence[StageTiming], *, submit_s: float, back_s: float) -> None:
        """Count a step that came back; one without timings counts for nothing.

        Args:
            timings: One entry a stage, in order.
            submit_s: On the scheduler's clock; `back_s` likewise.
        """
        idle_s = max(submit_s - self._last_back_s, 0.0)
        self._last_back_s = back_s
        if not timings:
            self.restart()  # what the stages did meanwhile is not known
            return
        inside_s = 0.0
        for timing in timings:
            inside_s += timing.end_s - timing.receive_s
        hop_s = self._hop_s = max(min(self._hop_s, (back_s - submit_s - inside_s) / (len(timings) + 1)), 0.0)
        while len(self._stages) < len(timings):
            self._stages.append(_Stage())
        fill_s = hop_s
        for stage, timing in zip(self._stages, timings, strict=False):
            stage.add(timing, idle_s=idle_s, hop_s=hop_s, fill_s=fill_s)
            fill_s += timing.end_s - timing.receive_s + hop_s

    def restart(self) -> None:
        """Forget what was in flight: processes were replaced, and the new ones have clocks and ways of their own."""
        self._hop_s = math.inf
        for stage in self._stages:
            stage.restart()

    def totals(self) -> tuple[StageTotals, ...]:
        """Return the sums of each stage; none before the first step."""
        return tuple(stage.totals() for stage in self._stages)


class _Stage:
    def __init__(self) -> None:
        self._last_end_s: float | None = None
        self._busy_s = 0.0
        self._comm_s = 0.0
        self._bubble_s = 0.0
        # All three, and bubble, at the start of the period before this one and of this one.
        self._older = (0.0, 0.0)
        self._newer = (0.0, 0.0)

    def add(self, timing: StageTiming, *, idle_s: float, hop_s: float, fill_s: float) -> None:
        receive_s, start_s, end_s = timing.receive_s, timing.start_s, timing.end_s
        last_end_s = self._last_end_s
        if last_end_s is None:
            wait_s, unpack_s = fill_s, start_s - receive_s
        else:
            wait_s, unpack_s = max(receive_s - last_end_s - idle_s, 0.0), start_s - max(receive_s, last_end_s)
        way_s = min(wait_s, hop_s)
        self._last_end_s = end_s
        self._busy_s += end_s - start_s
        self._comm_s += way_s + unpack_s
        self._bubble_s += wait_s - way_s
        all_s = self._busy_s + self._comm_s + self._bubble_s
        if all_s - self._newer[0] >= _RECENT_S:
            self._older, self._newer = self._newer, (all_s, self._bubble_s)

    def restart(self) -> None:
        self._last_end_s = None

    def totals(self) -> StageTotals:
        older_all_s, older_bubble_s = self._older
        recent_s = self._busy_s + self._comm_s + self._bubble_s - older_all_s
        return StageTotals(
            busy_s=self._busy_s,
            comm_s=self._comm_s,
            bubble_s=self._bubble_s,
            recent_bubble_share=(self._bubble_s - older_bubble_s) / recent_s if recent_s > 0 else 0.0,
        )
