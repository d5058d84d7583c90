"""Chrome trace JSON of the last steps, for https://ui.perfetto.dev or chrome://tracing.

A process stands for a pipeline: a track for the scheduler, on which a step lasts from `submit` to `back` (several are
in flight at once), and a track for each stage, on which it lasts from `start` to `end`, after what it took to unpack.
The format is that of the "Trace Event Format" document of the Chromium project; times are microseconds.

Clocks. Each stage has its own, so an offset is added to its times. It must let every step of an epoch (within which no
process is replaced) reach each place after it left the one before:

    submit <= receive of stage 0,   end of stage s <= receive of stage s + 1,   end of the last stage <= back.

Per hop, the step that made it in the shortest time gives the bound; together the bounds leave every stage an interval,
as wide as the shortest hops take in sum. If it holds 0 for all stages, their clocks are the scheduler's (as between
processes of one machine) and stay as they are. Otherwise the offsets are those with which the shortest time of each hop
is the same, as NTP assumes. So the error is at most the sum of the shortest hops, some milliseconds.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from rayserve_sarathi.step_log import PipelineTrace, StepRecord

Event = dict[str, object]

_encode = json.JSONEncoder(separators=(",", ":")).encode

_SCHEDULER_TRACK = 0
_SHORTEST_US = 1.0
"""To unpack nothing, where stages share a process, takes less."""


def render_chrome_trace(traces: Sequence[PipelineTrace]) -> bytes:
    """Return the JSON of all pipelines, which were asked at the same moment.

    It takes a second or two for the longest, in small pieces: in a thread of its own it holds up no other.
    """
    spans = [trace.now_s - trace.records[0].submit_s for trace in traces if trace.records]
    earliest_s = max(spans, default=0.0)  # seconds before the moment in which all were asked
    lines = (
        _encode(event)
        for process, trace in enumerate(traces)
        for event in _events(trace, process=process, zero_s=trace.now_s - earliest_s)
    )
    return ('{"displayTimeUnit":"ms","traceEvents":[\n' + ",\n".join(lines) + "\n]}\n").encode()


def clock_offsets(records: Iterable[StepRecord]) -> tuple[float, ...]:
    """Return what to add to the times of each stage to get the scheduler's; see the module.

    Args:
        records: Steps of one epoch; those without a time of each stage say nothing.
    """
    hops: list[float] = []  # the shortest time of each hop, by clocks as they are
    for record in records:
        if record.stages:
            leaves = [record.submit_s, *(end_s for _, _, end_s in record.stages)]
            arrivals = [*(receive_s for receive_s, _, _ in record.stages), record.back_s]
            times = [arrival - leave for leave, arrival in zip(leaves, arrivals, strict=True)]
            hops = list(map(min, hops, times)) if hops else times
    if all(hop >= 0 for hop in hops):
        return (0.0,) * (len(hops) - 1)
    share = sum(hops) / len(hops)
    return tuple(itertools.accumulate(share - hop for hop in hops[:-1]))


def _events(trace: PipelineTrace, *, process: int, zero_s: float) -> Iterator[Event]:
    num_stages = max((len(record.stages) for record in trace.records), default=0)
    yield _name("process_name", f"pipeline {trace.pipeline}", process=process)
    yield _name("thread_name", "scheduler: steps in flight", process=process, track=_SCHEDULER_TRACK)
    for stage in range(num_stages):
        yield _name("thread_name", f"stage {stage}", process=process, track=stage + 1)
    for _, group in itertools.groupby(trace.records, key=lambda record: record.epoch):
        epoch = list(group)
        offsets = clock_offsets(epoch)
        free_s = [float("-inf")] * num_stages
        for record in epoch:
            yield from _flight(record, process=process, zero_s=zero_s)
            for stage, (times, offset_s) in enumerate(zip(record.stages, offsets, strict=False)):
                receive_s, start_s, end_s = (time_s + offset_s - zero_s for time_s in times)
                begin_s = max(receive_s, free_s[stage])
                free_s[stage] = end_s
                if _us(start_s - begin_s) >= _SHORTEST_US:
                    yield _slice("unpack", begin_s, start_s, process=process, track=stage + 1)
                yield {
                    **_slice(f"step {record.step_id}", start_s, end_s, process=process, track=stage + 1),
                    "args": {"queued_us": _us(begin_s - receive_s)},
                }


def _flight(record: StepRecord, *, process: int, zero_s: float) -> Iterator[Event]:
    """Yield a step's way from the scheduler and back, as an asynchronous event: those of a track may overlap."""
    common: Event = {
        "name": f"step {record.step_id}",
        "cat": "step",
        "id": f"{process}.{record.epoch}.{record.step_id}",
        "pid": process,
        "tid": _SCHEDULER_TRACK,
    }
    arguments: Event = {
        "epoch": record.epoch,
        "num_decodes": record.num_decodes,
        "num_prefill_tokens": record.num_prefill_tokens,
        "request_ids": record.request_ids,
    }
    yield {**common, "ph": "b", "ts": _us(record.submit_s - zero_s), "args": arguments}
    yield {**common, "ph": "e", "ts": _us(record.back_s - zero_s)}


def _slice(name: str, begin_s: float, end_s: float, *, process: int, track: int) -> Event:
    return {
        "name": name,
        "ph": "X",
        "ts": _us(begin_s),
        "dur": round(_us(end_s) - _us(begin_s), 1),
        "pid": process,
        "tid": track,
    }


def _name(kind: str, name: str, *, process: int, track: int = 0) -> Event:
    return {"name": kind, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
