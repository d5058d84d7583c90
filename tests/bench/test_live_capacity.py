"""Whether a server keeps up with a rate."""

import asyncio
import io
import math

import numpy as np
import pytest

from rayserve_sarathi.bench.client import CompletionClient
from rayserve_sarathi.bench.live_capacity import LiveMeasurement, LiveProbe, describe_probe
from rayserve_sarathi.bench.prompts import Prompts
from rayserve_sarathi.bench.server_metrics import Buckets
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.workload import Workload
from tests.bench.engine_server import MODEL, engine_server
from tests.bench.outcomes import FULL, make_outcome
from tests.bench.scripted_server import DONE, event, refusal, scripted_server, stream, token

TIMEOUT_S = 60.0
CRITERIA = Criteria(p99_tbt_s=0.1)
FINE = [make_outcome([1.0, 1.05, 1.1]) for _ in range(100)]


def probe_of(*outcomes, queue_times: Buckets | None = None, is_complete: bool = True) -> LiveProbe:
    return describe_probe(outcomes, rate=2.0, queue_times=queue_times, is_complete=is_complete)


def keeps_up(*outcomes, is_complete: bool = True) -> bool:
    return CRITERIA.are_met(probe_of(*outcomes, is_complete=is_complete))


def test_a_rate_whose_times_are_within_the_criteria_is_sustained():
    probe = probe_of(*FINE)

    assert CRITERIA.are_met(probe)
    assert probe.p99_tbt_s == pytest.approx(0.05)
    assert (probe.median_scheduling_delay_s, probe.delay_source) == (1.0, "ttft")


def test_one_in_a_hundred_gaps_may_be_late_and_two_may_not():
    one, two = make_outcome([1.0, 1.05, 2.0]), make_outcome([1.0, 2.0, 3.0])

    assert keeps_up(*FINE, one)
    assert not keeps_up(*FINE[1:], one, two)


def test_a_median_delay_of_more_than_two_seconds_is_a_queue_that_grows():
    assert keeps_up(make_outcome([1.9, 1.95]), make_outcome([2.0, 2.05]), make_outcome([9.0, 9.05]))
    assert not keeps_up(make_outcome([1.9, 1.95]), make_outcome([2.1, 2.15]), make_outcome([9.0, 9.05]))


def test_the_servers_own_queue_times_come_first():
    slow = make_outcome([4.0, 4.05])
    probe = probe_of(slow, slow, queue_times=Buckets(cumulative={0.5: 0.0, 1.0: 2.0, math.inf: 2.0}))

    assert CRITERIA.are_met(probe)
    assert (probe.median_scheduling_delay_s, probe.delay_source) == (0.75, "metrics")
    assert probe_of(slow, queue_times=Buckets(cumulative={1.0: 0.0, math.inf: 0.0})).delay_source == "ttft"


def test_a_rate_at_which_a_request_fails_is_not_sustained():
    probe = probe_of(*FINE, make_outcome([], failure=FULL))

    assert not CRITERIA.are_met(probe)
    assert probe.num_failed == 1
    assert probe_of(make_outcome([], failure=FULL)).median_scheduling_delay_s == math.inf


def test_what_was_given_up_is_not_sustained():
    assert not keeps_up(*FINE, is_complete=False)


async def measured(url: str, *, model: str, num_requests: int, tbt_s: float) -> LiveProbe:
    workload = Workload(
        arrivals_s=np.arange(num_requests, dtype=np.float64),
        num_prompt_tokens=np.full(num_requests, 8),
        num_output_tokens=np.full(num_requests, 4),
        rate=1.0,
    )
    async with asyncio.timeout(TIMEOUT_S), CompletionClient(url, model=model) as client:
        measurement = LiveMeasurement(
            client,
            Prompts(vocab_size=100, seed=0),
            workload,
            criteria=Criteria(p99_tbt_s=tbt_s),
            stream=io.StringIO(),
        )
        await measurement.measure(500.0)
        return await measurement.measure(500.0)


async def test_a_real_server_is_measured_by_its_own_queue():
    async with engine_server() as url:
        probe = await measured(url, model=MODEL, num_requests=5, tbt_s=60.0)

    assert CRITERIA.are_met(probe)
    assert (probe.delay_source, probe.num_failed) == ("metrics", 0)
    assert 0 < probe.p99_tbt_s < 60


async def test_a_refusal_ends_a_probe_at_once():
    no_metrics = refusal("404 Not Found", b"")
    first = stream(event(token(num_tokens=1)), event(token(num_tokens=2)), DONE)
    full = refusal("429 Too Many Requests", b"full")
    # A thousand requests; those after the refusal are never sent.
    bodies: list[dict[str, object]] = []
    async with scripted_server([no_metrics, first, full], bodies=bodies) as url:
        probe = await measured(url, model="tiny", num_requests=1000, tbt_s=60.0)

    assert not probe.is_complete
    assert not CRITERIA.are_met(probe)
    assert probe.num_failed >= 1
    assert len(bodies) < 1000


async def test_late_gaps_end_a_probe_when_they_are_too_many():
    async with engine_server() as url:
        probe = await measured(url, model=MODEL, num_requests=200, tbt_s=1e-6)

    assert not probe.is_complete
    assert probe.delay_source == "metrics"
    assert not CRITERIA.are_met(probe)
