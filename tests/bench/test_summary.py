"""Figures of a load, against numbers computed by hand."""

import pytest

from rayserve_sarathi.bench.goodput import Targets, parse_targets
from rayserve_sarathi.bench.summary import Summary, gaps_s, summarise
from rayserve_sarathi.errors import ConfigError
from tests.bench.outcomes import FULL, LATE, make_outcome

ONE = make_outcome([1.0, 1.25, 1.75, 1.75], prompt=100)
"""TTFT 1 s, gaps of 250, 500 and 0 ms, two of them between chunks."""
TWO = make_outcome([3.5, 4.5], sent_s=1.5, due_s=1.25, prompt=50)
"""TTFT 2 s, one gap of 1 s."""
LONE = make_outcome([5.0], sent_s=2.0, prompt=1, asked=3)
"""One token after 3 s, though three were asked for."""


def summary(*outcomes, duration_s: float = 10.0, targets: Targets | None = None) -> Summary:
    return summarise(outcomes, duration_s=duration_s, percentiles=(50.0, 99.0), targets=targets)


def test_counts_and_rates():
    figures = summary(ONE, TWO, LONE).to_json()

    assert (figures["completed"], figures["failed"], figures["num_short"]) == (3, 0, 1)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (151, 7)
    assert figures["request_throughput"] == pytest.approx(0.3)
    assert figures["output_throughput"] == pytest.approx(0.7)
    assert figures["total_token_throughput"] == pytest.approx(15.8)
    assert figures["request_goodput"] is None


def test_most_open_at_a_time_and_most_tokens_in_a_second():
    figures = summary(ONE, TWO, LONE).to_json()

    # 0 to 1.75, 1.5 to 4.5, 2 to 5.
    assert figures["max_concurrent_requests"] == 2
    # All four of ONE lie in the second that begins at 1.
    assert figures["max_output_tokens_per_s"] == 4


def test_times_to_the_first_token():
    figures = summary(ONE, TWO, LONE).to_json()

    assert (figures["mean_ttft_ms"], figures["median_ttft_ms"], figures["max_ttft_ms"]) == (2000, 2000, 3000)
    assert figures["std_ttft_ms"] == pytest.approx(816.4966)
    assert figures["p50_ttft_ms"] == 2000
    assert figures["p99_ttft_ms"] == pytest.approx(2980)


def test_every_gap_counts_also_those_inside_a_chunk():
    figures = summary(ONE, TWO, LONE).to_json()

    assert sorted(gaps_s([ONE, TWO, LONE])) == [0.0, 0.25, 0.5, 1.0]
    assert (figures["mean_tbt_ms"], figures["p50_tbt_ms"], figures["max_tbt_ms"]) == (437.5, 375, 1000)
    # Between 0.5 and 1.0 at 0.97 of the way.
    assert figures["p99_tbt_ms"] == pytest.approx(985)


def test_itl_is_between_chunks_and_tpot_a_mean_of_each_request():
    figures = summary(ONE, TWO, LONE).to_json()

    assert figures["mean_itl_ms"] == pytest.approx((250 + 500 + 1000) / 3)
    # 750 ms over 3 gaps, 1000 ms over 1; a request with one token has none.
    assert figures["mean_tpot_ms"] == pytest.approx((250 + 1000) / 2)


def test_latency_to_the_last_token_and_per_token():
    figures = summary(ONE, TWO, LONE).to_json()

    assert figures["mean_e2el_ms"] == pytest.approx((1750 + 3000 + 3000) / 3)
    assert figures["mean_normalised_latency_ms"] == pytest.approx((1750 / 4 + 3000 / 2 + 3000) / 3)


def test_how_late_the_client_was_is_told():
    assert summary(ONE, TWO).to_json()["max_send_delay_ms"] == 250


def test_failures_are_counted_by_kind_and_their_times_left_out():
    refused = make_outcome([], sent_s=1.0, failure=FULL)
    cut = make_outcome([9.0, 99.0], failure=LATE)
    figures = summary(ONE, refused, refused, cut).to_json()

    assert (figures["completed"], figures["failed"]) == (1, 3)
    assert figures["failures"] == {"status 429": 2, "timeout": 1}
    assert (figures["max_ttft_ms"], figures["total_output_tokens"]) == (1000, 4)


def test_a_load_of_which_nothing_came_has_no_times():
    figures = summary(make_outcome([], failure=FULL)).to_json()

    assert (figures["completed"], figures["request_throughput"], figures["max_output_tokens_per_s"]) == (0, 0, 0)
    assert "mean_ttft_ms" not in figures


@pytest.mark.parametrize(
    ("targets", "num_good"),
    [
        (Targets(ttft_s=2.0), 2),
        (Targets(tbt_s=0.5), 2),
        (Targets(tbt_s=0.499), 1),
        (Targets(tpot_s=0.25), 2),
        (Targets(e2el_s=1.75), 1),
        (Targets(ttft_s=2.0, tbt_s=0.5), 1),
    ],
)
def test_goodput_counts_requests_that_meet_every_target(targets: Targets, num_good: int):
    found = summary(ONE, TWO, LONE, make_outcome([0.1], failure=FULL), targets=targets)

    assert found.num_good == num_good
    assert found.to_json()["request_goodput"] == pytest.approx(num_good / 10)


def test_targets_are_read_in_milliseconds():
    assert parse_targets(["ttft:2000", "tbt:100"]) == Targets(ttft_s=2.0, tbt_s=0.1)
    assert parse_targets([]) is None
    assert Targets(ttft_s=2.0).to_json() == {"ttft": 2000.0}


@pytest.mark.parametrize("pair", ["itl:3", "ttft", "ttft:", "ttft:-1", "ttft:x", ":5"])
def test_a_target_that_is_none_is_refused_with_those_that_are(pair: str):
    with pytest.raises(ConfigError, match=r"NAME:MILLISECONDS such as tbt:100.*\['ttft', 'tbt', 'tpot', 'e2el'\]"):
        parse_targets([pair])
