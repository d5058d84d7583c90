"""Queue times as a server tells them."""

import math

import pytest

from rayserve_sarathi.bench.server_metrics import Buckets, read_queue_times
from rayserve_sarathi.metrics import SchedulerMetrics, SchedulerState, Snapshot, render


def snapshot(pipeline: str, *queue_times_s: float) -> Snapshot:
    metrics = SchedulerMetrics()
    metrics.request_queue_time_s.observe_all(queue_times_s)
    state = SchedulerState(
        num_requests_running=0,
        num_requests_waiting=0,
        kv_cache_usage=0.0,
        prefill_backlog_tokens=0,
        num_steps_in_flight=0,
        token_budget=0,
    )
    return Snapshot(model_name="tiny", pipeline=pipeline, metrics=metrics, state=state)


def test_the_queue_times_of_all_pipelines_are_added():
    buckets = read_queue_times(render([snapshot("a", 0.3, 0.4), snapshot("b", 0.15, 400.0)]))

    assert buckets is not None
    assert buckets.count == 4
    assert (buckets.cumulative[0.2], buckets.cumulative[0.5], buckets.cumulative[math.inf]) == (1, 3, 4)


def test_a_quantile_lies_within_its_bucket_as_far_as_its_rank():
    buckets = read_queue_times(render([snapshot("a", 0.3, 0.4, 1.5, 2.0, 2.4)]))

    assert buckets is not None
    # Rank 2.5: half of the first of the three between 1.0 and 2.5.
    assert buckets.quantile(0.5) == pytest.approx(1.0 + 1.5 * 0.5 / 3)
    assert buckets.quantile(0.2) == pytest.approx(0.2 + 0.3 * 0.5)


def test_values_beyond_all_bounds_make_an_infinite_quantile():
    assert Buckets(cumulative={1.0: 1.0, math.inf: 4.0}).quantile(0.5) == math.inf


def test_a_difference_holds_only_what_came_since():
    before = read_queue_times(render([snapshot("a", 100.0, 100.0, 100.0)]))
    after = read_queue_times(render([snapshot("a", 100.0, 100.0, 100.0, 0.3)]))

    assert before is not None
    assert after is not None
    since = after.since(before)
    assert since.count == 1
    assert 0.2 < since.quantile(0.5) <= 0.5


@pytest.mark.parametrize("text", ["# TYPE a counter\na_total 3\n", "", "<html>no metrics {here</html>"])
def test_other_text_has_none(text: str):
    assert read_queue_times(text) is None
