"""Which requests the options of a command make."""

import argparse
import gzip
from pathlib import Path

import pytest

from rayserve_sarathi.bench import bench_command
from rayserve_sarathi.bench.planned_load import plan_load
from rayserve_sarathi.bench.run import Load
from rayserve_sarathi.errors import ConfigError


def plan(*options: str, max_model_len: int | None = None) -> Load:
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    if not {"--concurrency", "recorded"} & set(options):
        options = ("--request-rate", "4", *options)
    return plan_load(parser.parse_args(options), max_model_len=max_model_len)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = "".join(f"{10 + index},{160 + index * 16},{32}\n" for index in range(10))
    path.write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n{rows}")
    return path


def test_equal_seeds_make_equal_loads_and_others_do_not():
    options = ("--lengths", "100,300,20,40", "--num-requests", "50")

    assert plan(*options) == plan(*options)
    assert plan(*options) != plan(*options, "--seed", "1")


def test_another_rate_changes_nothing_but_the_scale_of_time():
    slow = plan("--num-requests", "9").arrivals_s
    fast = plan("--num-requests", "9", "--request-rate", "8").arrivals_s

    assert slow is not None
    assert fast == pytest.approx([time_s / 2 for time_s in slow])
    assert slow[0] == 0


def test_drawn_requests_fit_the_model():
    load = plan("--lengths", "300,2000,100,100", "--num-requests", "200", max_model_len=512)

    assert len(load) == 200
    assert max(map(sum, zip(load.num_prompt_tokens, load.num_output_tokens, strict=True))) <= 512


def test_requests_of_a_trace_are_divided_and_come_in_another_order(trace: Path):
    load = plan("--trace", str(trace), "--length-divisor", "16", "--num-requests", "10")

    assert sorted(load.num_prompt_tokens) == list(range(10, 20))
    assert list(load.num_prompt_tokens) != sorted(load.num_prompt_tokens)
    assert set(load.num_output_tokens) == {2}


def test_a_trace_that_is_too_short_is_used_again(trace: Path):
    load = plan("--trace", str(trace), "--num-requests", "25")

    assert len(load) == 25
    assert {load.num_prompt_tokens.count(length) for length in load.num_prompt_tokens} == {2, 3}


def test_requests_of_a_trace_that_do_not_fit_are_left_out(trace: Path):
    load = plan("--trace", str(trace), "--num-requests", "10", max_model_len=224)

    assert set(load.num_prompt_tokens) == {160, 176, 192}


def test_recorded_arrivals_begin_at_once_and_keep_their_order(trace: Path):
    packed = trace.with_suffix(".csv.gz")
    packed.write_bytes(gzip.compress(trace.read_bytes()))
    load = plan("--arrivals", "recorded", "--trace", str(packed), "--num-requests", "3")

    assert load.arrivals_s == [0.0, 1.0, 2.0]
    assert load.num_prompt_tokens == [160, 176, 192]


def test_a_closed_loop_has_clients_and_no_times():
    load = plan("--concurrency", "7")

    assert (load.arrivals_s, load.num_clients, len(load)) == (None, 7, 100)


def test_divided_lengths_fit_the_model_as_well():
    load = plan("--lengths", "1730,5696,415,834", "--length-divisor", "16", "--num-requests", "500", max_model_len=256)

    totals = [sum(pair) for pair in zip(load.num_prompt_tokens, load.num_output_tokens, strict=True)]
    assert max(totals) <= 256
    assert max(totals) > 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--concurrency", "0"), "--concurrency must be at least 1, got 0"),
        (("--concurrency", "2", "--arrivals", "recorded"), "leave out --arrivals recorded"),
        (("--length-divisor", "0", "--request-rate", "1"), "--length-divisor must be at least 1, got 0"),
        (("--max-model-len", "0", "--request-rate", "1"), "--max-model-len must be at least 2, got 0"),
        (("--arrival-cv", "2", "--request-rate", "1"), "--arrival-cv is for --arrivals gamma, and these are poisson"),
        (("--request-rate", "0"), "greater than 0, got 0"),
        (("--arrivals", "recorded"), "there are no recorded arrivals"),
        (("--request-rate", "inf"), "greater than 0, got inf"),
    ],
)
def test_wrong_options_are_told(options: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        plan(*options, max_model_len=512)


def test_a_load_needs_a_rate_or_clients():
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    with pytest.raises(ConfigError, match="give --request-rate, --concurrency, or --arrivals recorded"):
        plan_load(parser.parse_args([]), max_model_len=512)
