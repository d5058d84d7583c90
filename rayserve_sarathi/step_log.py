"""What the engine notes of each step: where its time went, and the last steps one by one for a trace.

It is called twice a step and never once a token; `benchmarks/step_log.py` says what it costs.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rayserve_sarathi.stage_times import StageTimes
from rayserve_sarathi.step import StepInput, StepOutput

MAX_RECORDS = 20_000
_MAX_REQUEST_IDS = 16


class StepRecord(NamedTuple):
    """A step that came back. A tuple, as 20,000 of them are sent at once."""

    step_id: int
    epoch: int
    num_decodes: int
    """Requests with a single token in the step."""
    num_prefill_tokens: int
    """The other tokens."""
    request_ids: tuple[str, ...]
    """The engine's own names, of up to 16 of the requests; those with most tokens are never left out."""
    submit_s: float
    """On the scheduler's clock, as is `back_s`."""
    stages: tuple[tuple[float, float, float], ...]
    """Receive, start and end at each stage, in order, each on its own clock."""
    back_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTrace:
    """The last steps of a pipeline.

    Args:
        pipeline: Its name.
        now_s: The scheduler's clock when the trace was taken.
        records: Oldest first.
    """

    pipeline: str
    now_s: float
    records: tuple[StepRecord, ...]


class StepLog:
    """Notes of the steps of one pipeline.

    Args:
        max_records: How many steps a trace has at most.
    """

    def __init__(self, *, max_records: int = MAX_RECORDS) -> None:
        self.stage_times = StageTimes()
        self._in_flight: deque[tuple[StepInput, float]] = deque()
        self._records: deque[StepRecord] = deque(maxlen=max_records)

    def note_submit(self, step: StepInput, now_s: float) -> None:
        """Note a step that is about to be sent."""
        self._in_flight.append((step, now_s))

    def note_return(self, output: StepOutput, now_s: float) -> None:
        """Note that the oldest step in flight has come back."""
        step, submit_s = self._in_flight.popleft()
        assert (step.step_id, step.epoch) == (output.step_id, output.epoch), f"{output.step_id} is not the oldest"
        self.stage_times.add(output.timings, submit_s=submit_s, back_s=now_s)
        num_decodes = int(np.count_nonzero(step.query_lens == 1))
        self._records.append(
            StepRecord(
                step.step_id,
                step.epoch,
                num_decodes,
                step.num_tokens - num_decodes,
                step.request_ids[-_MAX_REQUEST_IDS:],  # the chunks of prompts are the last ones
                submit_s,
                tuple([(timing.receive_s, timing.start_s, timing.end_s) for timing in output.timings]),
                now_s,
            )
        )

    def restart(self) -> None:
        """Forget the steps in flight: the pipeline was rebuilt, and they never come back."""
        self._in_flight.clear()
        self.stage_times.restart()

    def trace(self, *, pipeline: str, now_s: float) -> PipelineTrace:
        """Return the last steps."""
        return PipelineTrace(pipeline=pipeline, now_s=now_s, records=tuple(self._records))
