"""Requests have the lengths and the arrivals that were asked for."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.workload import ARXIV_LENGTHS, Lengths, LognormalLengths, make_workload, read_trace
from tests.measured_data import data_folder

TRACE = "num_prefill_tokens,num_decode_tokens,arrived_at\n30,3,2.5\n10,1,0.5\n20,0,1.0\n"


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path, name: str):
    lengths = read_trace(write(tmp_path / name, TRACE))

    assert lengths.num_prompt_tokens.tolist() == [10, 20, 30]
    assert lengths.num_output_tokens.tolist() == [1, 1, 3]
    assert lengths.arrivals_s is not None
    assert lengths.arrivals_s.tolist() == [0.5, 1.0, 2.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_prefill_tokens\n1\n", "has no column num_decode_tokens"),
        ("num_prefill_tokens,num_decode_tokens\n", "has no requests"),
        ("num_prefill_tokens,num_decode_tokens\n5,5\n0,5\n", "line 3: 0 prompt"),
        ("num_prefill_tokens,num_decode_tokens\n5,x\n", "line 2: could not convert"),
        ("num_prefill_tokens,num_decode_tokens\n5\n", "line 2: "),
        ("num_prefill_tokens,num_decode_tokens,arrived_at\n5,5,inf\n", "line 2: arrived_at inf"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path / "trace.csv", text))


def test_a_trace_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the trace .*none\.csv: No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(write(tmp_path / "plain.csv", TRACE).rename(tmp_path / "plain.gz"))


def test_fitted_lengths_have_their_medians_and_percentiles():
    workload = make_workload(ARXIV_LENGTHS, num_requests=20_000, seed=1)

    for values, median, p90 in (
        (workload.num_prompt_tokens, 7059, 12985),
        (workload.num_output_tokens, 208, 371),
    ):
        assert np.median(values) == pytest.approx(median, rel=0.03)
        assert np.quantile(values, 0.9) == pytest.approx(p90, rel=0.03)


def test_no_request_is_longer_than_allowed():
    workload = make_workload(ARXIV_LENGTHS, num_requests=2000, max_total_tokens=4096)

    assert len(workload) == 2000
    assert (workload.num_prompt_tokens + workload.num_output_tokens).max() <= 4096


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 3.0)])
def test_arrivals_have_their_rate_and_variation(arrivals, cv: float):
    workload = make_workload(ARXIV_LENGTHS, num_requests=50_000, rate=4.0, arrivals=arrivals, arrival_cv=cv, seed=2)

    gaps_s = np.diff(workload.arrivals_s)
    assert gaps_s.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.csv.gz", gzip.compress(b"num_prefill_tokens,num_decode_tokens\n" + b"1,1\n" * 99)[:-12]),
        (
            "damaged.csv.gz",
            gzip.compress(b"num_prefill_tokens,num_decode_tokens\n" + b"1,1\n" * 99)[:20] + b"\x7f" * 40,
        ),
        ("latin.csv", b"num_prefill_tokens,num_decode_tokens\n1,\xe9\n"),
        ("quote.csv", b'num_prefill_tokens,num_decode_tokens\n1,"' + b"1" * 200_000 + b'"\n'),
    ],
)
def test_a_broken_trace_is_told(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ConfigError, match=rf"the trace .*{name} is broken: "):
        read_trace(tmp_path / name)


def test_lengths_are_divided_but_never_to_nothing():
    workload = make_workload(ARXIV_LENGTHS, num_requests=50).with_lengths_divided(200)

    assert workload.num_output_tokens.min() == 1
    assert workload.num_prompt_tokens.max() < 200


def test_the_same_seed_gives_the_same_requests_at_any_rate():
    slow, fast = (make_workload(ARXIV_LENGTHS, num_requests=50, rate=rate, seed=7) for rate in (1.0, 4.0))

    assert slow.num_prompt_tokens.tolist() == fast.num_prompt_tokens.tolist()
    assert fast.arrivals_s == pytest.approx(slow.arrivals_s / 4)
    assert slow.at_rate(4.0).arrivals_s == pytest.approx(fast.arrivals_s)
    other = make_workload(ARXIV_LENGTHS, num_requests=50, rate=1.0, seed=8)
    assert other.num_prompt_tokens.tolist() != slow.num_prompt_tokens.tolist()


def test_a_trace_is_drawn_without_repeating_until_it_is_used_up():
    lengths = Lengths(num_prompt_tokens=np.arange(1, 11), num_output_tokens=np.arange(1, 11))

    workload = make_workload(lengths, num_requests=20, max_total_tokens=10)

    assert sorted(workload.num_prompt_tokens.tolist()) == sorted([1, 2, 3, 4, 5] * 4)
    assert sorted(workload.num_prompt_tokens[:5].tolist()) == [1, 2, 3, 4, 5]


def test_recorded_arrivals_are_kept_or_scaled(tmp_path: Path):
    lengths = read_trace(write(tmp_path / "trace.csv", TRACE))

    recorded = make_workload(lengths, num_requests=3, arrivals="recorded")
    assert recorded.arrivals_s.tolist() == [0.0, 0.5, 2.0]
    assert recorded.num_prompt_tokens.tolist() == [10, 20, 30]
    assert recorded.rate == 1.0
    assert recorded.at_rate(2.0).arrivals_s.tolist() == [0.0, 0.25, 1.0]
    with pytest.raises(ConfigError, match="4 requests, but 3 arrivals were recorded"):
        make_workload(lengths, num_requests=4, arrivals="recorded")
    with pytest.raises(ConfigError, match="no recorded arrivals"):
        make_workload(ARXIV_LENGTHS, num_requests=3, arrivals="recorded")


def test_settings_that_make_no_workload_are_refused():
    with pytest.raises(ConfigError, match="at least 1 request, got 0"):
        make_workload(ARXIV_LENGTHS, num_requests=0)
    with pytest.raises(ConfigError, match="rate is a number of requests a second greater than 0, got 0"):
        make_workload(ARXIV_LENGTHS, num_requests=1, rate=0)
    with pytest.raises(ConfigError, match="arrival_cv must be a number greater than 0, got -1"):
        make_workload(ARXIV_LENGTHS, num_requests=1, arrival_cv=-1)
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        make_workload(ARXIV_LENGTHS, num_requests=1, seed=-1)
    with pytest.raises(ConfigError, match="hardly any request"):
        make_workload(ARXIV_LENGTHS, num_requests=1, max_total_tokens=2)
    with pytest.raises(ConfigError, match="prompt_median must be at least 1 and at most prompt_p90, got 9 and 8"):
        LognormalLengths(prompt_median=9, prompt_p90=8, output_median=1, output_p90=1)


def test_the_chat_trace_of_the_paper_has_its_published_lengths():
    folder = data_folder()
    if folder is None:
        pytest.skip("no measured data here; set SARATHI_DATA")
    lengths = read_trace(folder / "traces" / "sharegpt_8k_filtered_stats_llama2_tokenizer.csv.gz")

    assert np.median(lengths.num_prompt_tokens) == 1730
    assert np.quantile(lengths.num_prompt_tokens, 0.9) == 5696
    assert np.median(lengths.num_output_tokens) == 415
    assert np.quantile(lengths.num_output_tokens, 0.9) == 834
