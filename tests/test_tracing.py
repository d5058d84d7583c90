"""Traces: clocks are aligned, and every slice is where it was."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest

from rayserve_sarathi.step_log import PipelineTrace, StepRecord
from rayserve_sarathi.tracing import clock_offsets, render_chrome_trace
from tests.timelines import TimedStep, timeline

BUSY_S = [[0.01, 0.02, 0.01], [0.03, 0.01, 0.02], [0.01, 0.01, 0.01]] * 5


def records_of(steps: Sequence[TimedStep], *, epoch: int = 0) -> tuple[StepRecord, ...]:
    return tuple(
        StepRecord(
            step_id=index,
            epoch=epoch,
            num_decodes=2,
            num_prefill_tokens=30,
            request_ids=("request-1",),
            submit_s=step.submit_s,
            stages=tuple((timing.receive_s, timing.start_s, timing.end_s) for timing in step.timings),
            back_s=step.back_s,
        )
        for index, step in enumerate(steps)
    )


def render(*traces: PipelineTrace) -> list[dict[str, Any]]:
    document = json.loads(render_chrome_trace(traces))
    assert document["displayTimeUnit"] == "ms"
    events: list[dict[str, Any]] = document["traceEvents"]
    return events


def slices(events: list[dict[str, Any]], *, track: int, process: int = 0) -> list[tuple[str, float, float]]:
    return [
        (event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (process, track)
    ]


def test_clocks_of_one_machine_are_left_alone():
    steps = timeline(BUSY_S, max_in_flight=4, hop_s=0.001)

    assert clock_offsets(records_of(steps)) == (0.0, 0.0, 0.0)


def test_other_clocks_are_found_to_within_the_shortest_hops():
    clocks_s = [1e4, -2e4, 33.0]
    steps = timeline(BUSY_S, max_in_flight=4, hop_s=0.001, clocks_s=clocks_s)

    assert clock_offsets(records_of(steps)) == pytest.approx([-clock_s for clock_s in clocks_s], abs=1e-6)


def test_aligned_steps_reach_each_place_after_they_left_the_one_before():
    steps = timeline(BUSY_S, max_in_flight=4, hop_s=0.001, clocks_s=[7.0, 8.0, 9.0], has_inbox=True)
    offsets = clock_offsets(records_of(steps))

    for record in records_of(steps):
        times = [record.submit_s]
        for (receive_s, _, end_s), offset_s in zip(record.stages, offsets, strict=True):
            times += [receive_s + offset_s, end_s + offset_s]
        assert [*times, record.back_s] == sorted([*times, record.back_s])


def test_each_stage_has_a_track_and_the_scheduler_another():
    trace = PipelineTrace(pipeline="a", now_s=1.0, records=records_of(timeline([[0.01, 0.02]], max_in_flight=1)))
    events = render(trace)

    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {0: "scheduler: steps in flight", 1: "stage 0", 2: "stage 1"}
    assert slices(events, track=1) == [("step 0", 0.0, 10_000.0)]
    assert slices(events, track=2) == [("step 0", 10_000.0, 20_000.0)]
    begin, end = (event for event in events if event["ph"] in "be")
    assert (begin["ts"], end["ts"], begin["id"] == end["id"]) == (0.0, 30_000.0, True)
    assert begin["args"] == {
        "epoch": 0,
        "num_decodes": 2,
        "num_prefill_tokens": 30,
        "request_ids": ["request-1"],
    }


@pytest.mark.parametrize("has_inbox", [False, True])
def test_slices_of_a_stage_follow_each_other(has_inbox: bool):
    steps = timeline(BUSY_S, max_in_flight=4, hop_s=0.001, unpack_s=0.002, clocks_s=[5, 6, 7], has_inbox=has_inbox)
    events = render(PipelineTrace(pipeline="a", now_s=100.0, records=records_of(steps)))

    for track in (1, 2, 3):
        found = slices(events, track=track)
        assert [name for name, _, _ in found] == [
            name for step in range(len(steps)) for name in ("unpack", f"step {step}")
        ]
        for (_, begin, duration), (_, following, _) in itertools.pairwise(found):
            assert begin + duration <= following + 0.2


def test_epochs_are_aligned_apart():
    first = records_of(timeline([[0.01, 0.01]] * 3, max_in_flight=1, hop_s=0.001))
    second = records_of(
        timeline([[0.01, 0.01]] * 3, max_in_flight=1, hop_s=0.001, begin_s=5.0, clocks_s=[100.0, -100.0]), epoch=1
    )
    events = render(PipelineTrace(pipeline="a", now_s=10.0, records=first + second))

    assert [begin for _, begin, _ in slices(events, track=1)][::3] == pytest.approx([1_000.0, 5_001_000.0], abs=1)


def test_pipelines_are_aligned_by_the_moment_they_were_asked():
    records = records_of(timeline([[0.01]], max_in_flight=1))
    events = render(
        PipelineTrace(pipeline="a", now_s=3.0, records=records),
        PipelineTrace(pipeline="b", now_s=1.0, records=records),
    )

    assert slices(events, track=1, process=0) == [("step 0", 0.0, 10_000.0)]
    assert slices(events, track=1, process=1) == [("step 0", 2_000_000.0, 10_000.0)]


def test_a_pipeline_without_steps_has_its_name_only():
    events = render(PipelineTrace(pipeline="a", now_s=1.0, records=()))

    assert {event["ph"] for event in events} == {"M"}


def test_a_step_without_timings_is_only_the_schedulers():
    record = records_of(timeline([[0.01]], max_in_flight=1))[0]._replace(stages=())
    events = render(PipelineTrace(pipeline="a", now_s=1.0, records=(record,)))

    assert sorted(event["ph"] for event in events) == ["M", "M", "b", "e"]
