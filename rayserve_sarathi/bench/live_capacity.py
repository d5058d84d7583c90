"""Whether a server keeps up with a rate, by the criteria of the paper (section 5), from outside.

A rate is sustained if the median scheduling delay is at most 2 s, so that the queue does not grow without end, and the
99th percentile of the time between tokens is at most the target. The scheduling delay is the server's own measurement
(`server_metrics`). Where it shows none, the time to the first token stands for it, which includes the prefill: the
criterion is then a little stricter than the paper's, and the result says so.
"""

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

import numpy as np

from rayserve_sarathi.bench.client import CompletionClient
from rayserve_sarathi.bench.load import Tally
from rayserve_sarathi.bench.outcome import Outcome
from rayserve_sarathi.bench.planned_load import to_load
from rayserve_sarathi.bench.prompts import Prompts
from rayserve_sarathi.bench.run import run_load
from rayserve_sarathi.bench.server_metrics import Buckets, read_queue_times
from rayserve_sarathi.bench.summary import gaps_s
from rayserve_sarathi.simulation.criteria import Criteria, most_long_gaps
from rayserve_sarathi.simulation.workload import Workload

_QUANTILE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveProbe:
    """What a server did at one rate; a `criteria.RunResult`."""

    rate: float
    """Requests a second."""
    p99_tbt_s: float
    """Of the requests that ended; 0 if none of them has two tokens."""
    scheduling_delay_s: float
    """The median; infinite if no request had a first token."""
    delay_source: Literal["metrics", "ttft"]
    """Where it comes from: the server's metrics, or times to the first token, which are more."""
    num_failed: int
    is_complete: bool
    """Whether all requests were sent; a probe ends as soon as it cannot meet the criteria any more."""
    duration_s: float

    @property
    def median_scheduling_delay_s(self) -> float:
        """What the criteria see: infinite if requests failed, which then wait for ever, or were never sent."""
        return self.scheduling_delay_s if self.is_complete and not self.num_failed else math.inf


class LiveMeasurement:
    """Measures one rate after the other with the same requests in the same rhythm, but new prompts.

    Args:
        client: Of the server.
        prompts: Where prompts come from; those of its seed and of the seeds after it are used up, one for each probe.
        workload: The requests, at any rate.
        criteria: What to keep.
        stream: Where progress is shown.
    """

    def __init__(
        self,
        client: CompletionClient,
        prompts: Prompts,
        workload: Workload,
        *,
        criteria: Criteria,
        stream: TextIO = sys.stderr,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._workload = workload
        self._criteria = criteria
        self._stream = stream
        self._num_probes = 0

    async def measure(self, rate: float) -> LiveProbe:
        """Send the requests at `rate` a second; return what came of it, as soon as that is certain."""
        prompts = Prompts(vocab_size=self._prompts.vocab_size, seed=self._prompts.seed + self._num_probes)
        self._num_probes += 1
        before = await self._queue_times()
        load = to_load(self._workload.at_rate(rate))
        tally = Tally(num_requests=len(load))
        hopeless = _Hopeless(self._criteria, num_gaps=sum(load.num_output_tokens) - len(load))
        tally.note = hopeless.note
        sending = asyncio.create_task(run_load(self._client, prompts, load, tally=tally, stream=self._stream))
        giving_up = asyncio.create_task(hopeless.is_certain.wait())
        try:
            await asyncio.wait((sending, giving_up), return_when=asyncio.FIRST_COMPLETED)
            is_complete = sending.done()
            if is_complete:
                sending.result()  # raises what no request may
        finally:
            sending.cancel()
            giving_up.cancel()
            await asyncio.gather(sending, giving_up, return_exceptions=True)
        after = await self._queue_times()
        return describe_probe(
            tally.outcomes,
            rate=rate,
            queue_times=None if before is None or after is None else after.since(before),
            is_complete=is_complete,
        )

    async def _queue_times(self) -> Buckets | None:
        text = await self._client.metrics()
        return None if text is None else read_queue_times(text)


def describe_probe(
    outcomes: Sequence[Outcome], *, rate: float, queue_times: Buckets | None, is_complete: bool
) -> LiveProbe:
    """Return what a server did at a rate.

    Args:
        outcomes: Of the requests that ended; at least one.
        rate: Requests a second.
        queue_times: Of these requests, by the server's metrics; None if it has none.
        is_complete: Whether all requests were sent.
    """
    gaps = gaps_s(outcomes)
    p99_tbt_s = float(np.quantile(gaps, _QUANTILE)) if len(gaps) else 0.0
    ttfts_s = [outcome.ttft_s for outcome in outcomes if outcome.token_times_s]
    delay_s = float(np.median(ttfts_s)) if ttfts_s else math.inf
    is_told = queue_times is not None and queue_times.count > 0
    if queue_times is not None and is_told:
        delay_s = queue_times.quantile(0.5)
    return LiveProbe(
        rate=rate,
        p99_tbt_s=p99_tbt_s,
        scheduling_delay_s=delay_s,
        delay_source="metrics" if is_told else "ttft",
        num_failed=sum(outcome.failure is not None for outcome in outcomes),
        is_complete=is_complete,
        duration_s=max(outcome.end_s for outcome in outcomes) - min(outcome.sent_s for outcome in outcomes),
    )


class _Hopeless:
    """Tells when a probe can meet its criteria no more, whatever the rest of its requests do.

    Args:
        criteria: Those.
        num_gaps: How many gaps there will be in all.
    """

    def __init__(self, criteria: Criteria, *, num_gaps: int) -> None:
        self._target_s = criteria.p99_tbt_s
        self._num_late_allowed = most_long_gaps(num_gaps)
        self._num_late = 0
        self.is_certain = asyncio.Event()

    def note(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            self.is_certain.set()
            return
        self._num_late += int(np.count_nonzero(np.diff(outcome.token_times_s) > self._target_s))
        if self._num_late > self._num_late_allowed:
            self.is_certain.set()
