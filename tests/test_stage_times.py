"""Busy, comm and bubble of stages, on timelines whose answer is known."""

from collections.abc import Sequence

import pytest

from rayserve_sarathi.stage_times import StageTimes, StageTotals
from tests.timelines import TimedStep, joined, timeline


def sum_up(steps: Sequence[TimedStep]) -> tuple[StageTotals, ...]:
    times = StageTimes()
    for step in steps:
        times.add(step.timings, submit_s=step.submit_s, back_s=step.back_s)
    return times.totals()


def seconds(totals: Sequence[StageTotals]) -> list[float]:
    """Return busy, comm and bubble of each stage."""
    return [value for stage in totals for value in (stage.busy_s, stage.comm_s, stage.bubble_s)]


def shares(steps: Sequence[TimedStep]) -> list[float]:
    return [stage.bubble_s / (stage.busy_s + stage.comm_s + stage.bubble_s) for stage in sum_up(steps)]


def almost(value: float | Sequence[float]) -> object:
    return pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("num_stages", "num_steps"), [(1, 10), (2, 50), (4, 50)])
def test_a_perfect_pipeline_has_no_bubbles_but_to_fill(num_stages: int, num_steps: int):
    steps = timeline([[0.01] * num_stages] * num_steps, max_in_flight=num_stages + 1)

    assert shares(steps) == almost([stage / (num_steps + stage) for stage in range(num_stages)])


@pytest.mark.parametrize("num_stages", [2, 4])
def test_to_drain_counts_with_the_next_step(num_stages: int):
    first = timeline([[0.01] * num_stages] * 50, max_in_flight=num_stages + 1)
    next_one = timeline([[0.01] * num_stages], max_in_flight=1, begin_s=first[-1].back_s)
    totals = sum_up(joined(first, next_one))

    # Each stage waits for all others once to drain and fill again, beside the first fill.
    assert [stage.bubble_s for stage in totals] == almost(
        [0.01 * (stage + num_stages - 1) for stage in range(num_stages)]
    )


@pytest.mark.parametrize("num_stages", [2, 4])
def test_one_step_at_a_time_leaves_each_stage_its_share_only(num_stages: int):
    steps = timeline([[0.01] * num_stages] * 500, max_in_flight=1)

    assert shares(steps) == pytest.approx([1 - 1 / num_stages] * num_stages, abs=0.001)


def test_a_stage_that_is_twice_as_fast_waits_half_of_the_time():
    steps = timeline([[0.01, 0.02]] * 500, max_in_flight=3)

    assert shares(steps) == pytest.approx([0.5, 0.0], abs=0.01)


def test_time_without_a_step_counts_for_nothing():
    first = timeline([[0.01, 0.01]] * 20, max_in_flight=3)
    at_once = timeline([[0.01, 0.01]] * 20, max_in_flight=3, begin_s=first[-1].back_s)
    hours_later = timeline([[0.01, 0.01]] * 20, max_in_flight=3, begin_s=10_000.0)

    assert seconds(sum_up(joined(first, hours_later))) == almost(seconds(sum_up(joined(first, at_once))))


@pytest.mark.parametrize("has_inbox", [False, True])
def test_the_clocks_of_stages_change_nothing(has_inbox: bool):
    def totals(clocks_s: list[float]) -> list[float]:
        busy_s = [[0.01, 0.02, 0.01], [0.03, 0.01, 0.02]] * 10
        steps = timeline(busy_s, max_in_flight=4, hop_s=0.001, unpack_s=0.002, clocks_s=clocks_s, has_inbox=has_inbox)
        return seconds(sum_up(steps))

    assert totals([5e5, -3e5, 17.0]) == almost(totals([0.0, 0.0, 0.0]))


def test_when_a_message_counts_as_received_changes_nothing():
    def totals(*, has_inbox: bool) -> list[float]:
        busy_s = [[0.01, 0.02, 0.01], [0.03, 0.01, 0.02]] * 10
        first = timeline([[0.01] * 3], max_in_flight=1, hop_s=0.001)
        others = timeline(busy_s, max_in_flight=4, hop_s=0.001, begin_s=5.0, has_inbox=has_inbox)
        return seconds(sum_up(joined(first, others)))

    assert totals(has_inbox=True) == almost(totals(has_inbox=False))


def test_busy_comm_and_bubble_are_the_time_in_flight():
    steps = timeline([[0.01, 0.01]] * 50, max_in_flight=1, hop_s=0.002, unpack_s=0.003)
    last_s = [timing.end_s for timing in steps[-1].timings]
    totals = sum_up(steps)

    assert [stage.busy_s + stage.comm_s + stage.bubble_s for stage in totals] == almost(last_s)
    assert [stage.busy_s for stage in totals] == almost([0.5, 0.5])
    assert [stage.comm_s for stage in totals] == almost([50 * (0.002 + 0.003)] * 2)


@pytest.mark.parametrize("has_inbox", [False, True])
def test_a_message_that_comes_while_its_stage_computes_costs_the_stage_nothing(has_inbox: bool):
    totals = sum_up(timeline([[0.01, 0.01]] * 50, max_in_flight=4, hop_s=0.002, has_inbox=has_inbox))

    # Only the first message of all is waited for.
    assert [stage.comm_s for stage in totals] == almost([0.002, 0.002])


def test_nothing_ever_shrinks():
    times = StageTimes()
    before = [0.0] * 6
    for step in timeline([[0.01, 0.05], [0.05, 0.01], [0.02, 0.02]] * 20, max_in_flight=3, hop_s=0.001):
        times.add(step.timings, submit_s=step.submit_s, back_s=step.back_s)
        now = seconds(times.totals())
        assert all(new >= old for new, old in zip(now, before, strict=True))
        before = now


def test_the_recent_share_is_that_of_the_last_seconds():
    alone = timeline([[0.5, 0.5]] * 100, max_in_flight=1)
    busy = timeline([[0.5, 0.5]] * 100, max_in_flight=3, begin_s=1000.0)

    assert [stage.recent_bubble_share for stage in sum_up(alone)] == almost([0.5, 0.5])
    assert [stage.recent_bubble_share for stage in sum_up(joined(alone, busy))] == almost([0.0, 0.0])


def test_a_rebuilt_pipeline_has_new_clocks():
    times = StageTimes()
    before = timeline([[0.01, 0.01]] * 10, max_in_flight=1, hop_s=0.001)
    after = timeline([[0.01, 0.01]] * 10, max_in_flight=1, hop_s=0.001, begin_s=50.0, clocks_s=[-1e6, 1e6])
    for step in before:
        times.add(step.timings, submit_s=step.submit_s, back_s=step.back_s)
    once = seconds(times.totals())
    times.restart()
    for step in after:
        times.add(step.timings, submit_s=step.submit_s, back_s=step.back_s)

    assert seconds(times.totals()) == almost([2 * value for value in once])


def test_steps_without_timings_count_for_nothing():
    times = StageTimes()
    times.add((), submit_s=1.0, back_s=1.0)
    assert times.totals() == ()

    first = timeline([[0.01, 0.01]] * 10, max_in_flight=1, hop_s=0.001)
    after = timeline([[0.01, 0.01]] * 10, max_in_flight=1, hop_s=0.001, begin_s=5000.0)
    for step in (*first, TimedStep(submit_s=4000.0, timings=(), back_s=4000.1), *after):
        times.add(step.timings, submit_s=step.submit_s, back_s=step.back_s)

    assert seconds(times.totals()) == almost([2 * value for value in seconds(sum_up(first))])
