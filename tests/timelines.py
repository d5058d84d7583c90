"""Steps that went through stages as a test says, and what every clock showed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from rayserve_sarathi.step import StageTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """A step that came back."""

    submit_s: float
    timings: tuple[StageTiming, ...]
    back_s: float


def timeline(
    busy_s: Sequence[Sequence[float]],
    *,
    max_in_flight: int,
    hop_s: float = 0.0,
    unpack_s: float = 0.0,
    begin_s: float = 0.0,
    clocks_s: Sequence[float] | None = None,
    has_inbox: bool = False,
) -> list[TimedStep]:
    """Run steps through stages; each is submitted as soon as there may be one more in flight.

    Args:
        busy_s: Of each step the time at each stage.
        max_in_flight: Steps between the scheduler and its return at once.
        hop_s: A message's way from one process to the next.
        unpack_s: Between a stage's receive and start.
        begin_s: When the first step is submitted.
        clocks_s: What to add to the times of each stage.
        has_inbox: Whether a message counts as received while its stage still computes, rather than after that.
    """
    clocks = clocks_s or [0.0] * len(busy_s[0])
    free_s = [0.0] * len(clocks)
    steps: list[TimedStep] = []
    for index, durations in enumerate(busy_s):
        submit_s = begin_s if index < max_in_flight else steps[index - max_in_flight].back_s
        now_s, timings = submit_s, []
        for stage, (duration_s, clock_s) in enumerate(zip(durations, clocks, strict=True)):
            arrival_s = now_s + hop_s
            begin_stage_s = max(arrival_s, free_s[stage])
            start_s = begin_stage_s + unpack_s
            free_s[stage] = now_s = start_s + duration_s
            timings.append(
                StageTiming(
                    stage=stage,
                    receive_s=clock_s + (arrival_s if has_inbox else begin_stage_s),
                    start_s=clock_s + start_s,
                    end_s=clock_s + now_s,
                )
            )
        steps.append(TimedStep(submit_s=submit_s, timings=tuple(timings), back_s=now_s + hop_s))
    return steps


def joined(*timelines: Sequence[TimedStep]) -> list[TimedStep]:
    """Return one timeline after the other."""
    return list(chain(*timelines))
