"""The search for the largest rate that keeps up, with runs that are functions of the rate."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.capacity import find_capacity
from rayserve_sarathi.simulation.criteria import Criteria

CRITERIA = Criteria(p99_tbt_s=0.1)


@dataclass(frozen=True)
class Run:
    median_scheduling_delay_s: float
    p99_tbt_s: float


def run_with_capacity(capacity: float):
    return lambda rate: Run(median_scheduling_delay_s=0.0 if rate <= capacity else 9.0, p99_tbt_s=0.05)


@given(capacity=st.floats(0.011, 9_000), first_rate=st.floats(0.01, 10_000))
def test_the_rate_found_keeps_up_and_one_a_fortieth_larger_does_not(capacity: float, first_rate: float):
    found = find_capacity(run_with_capacity(capacity), CRITERIA.are_met, first_rate=first_rate)

    assert found.rate <= capacity
    assert found.rate * 1.025 >= capacity * (1 - 1e-9)
    assert found.best is not None
    assert found.best.rate == found.rate
    assert len(found.trials) < 30


def test_a_run_must_meet_both_criteria():
    def run(rate: float) -> Run:
        return Run(median_scheduling_delay_s=rate / 4, p99_tbt_s=rate / 40)

    assert 3.9 <= find_capacity(run, CRITERIA.are_met).rate <= 4  # the gaps are the limit
    assert 7.8 <= find_capacity(run, Criteria(p99_tbt_s=1.0).are_met).rate <= 8  # the delay is


def test_a_system_that_never_keeps_up_has_no_capacity():
    found = find_capacity(run_with_capacity(0.0), CRITERIA.are_met)

    assert (found.rate, found.best) == (0.0, None)
    assert found.trials[-1].rate == 0.01


def test_the_search_ends_at_the_largest_rate():
    assert find_capacity(run_with_capacity(1e9), CRITERIA.are_met, max_rate=50.0).rate == 50.0
    assert find_capacity(run_with_capacity(1e9), CRITERIA.are_met, first_rate=50.0, max_rate=50.0).rate == 50.0


def test_rates_out_of_order_are_refused():
    with pytest.raises(ConfigError, match="min_rate <= first_rate"):
        find_capacity(run_with_capacity(1.0), CRITERIA.are_met, first_rate=0.001)
    with pytest.raises(ConfigError, match="tolerance must be greater than 0, got 0"):
        find_capacity(run_with_capacity(1.0), CRITERIA.are_met, tolerance=0)
    with pytest.raises(ConfigError, match="p99_tbt_s must be greater than 0, got 0"):
        Criteria(p99_tbt_s=0)
