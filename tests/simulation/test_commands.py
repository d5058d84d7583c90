"""`sarathi simulate` and `sarathi capacity --hardware` end to end."""

import json
import re
from pathlib import Path

import pytest

from rayserve_sarathi.cli import main

SYSTEM = ["--model", "mistral-7b", "--hardware", "a100", "--num-requests", "40", "--seed", "1"]


def test_a_workload_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures.json"

    assert main(["simulate", *SYSTEM, "--rate", "1", "--json", str(path)]) == 0

    text, figures = capsys.readouterr().out, json.loads(path.read_text())
    assert "time to first token" in text
    assert "40 requests in" in text
    assert figures["num_requests"] == 40
    assert figures["rate"] == 1
    assert 0.01 < figures["tbt_s"]["p50"] < figures["tbt_s"]["p99"] < 0.1


def test_a_policy_of_the_paper_stalls_decodes(tmp_path: Path):
    longest_s = {}
    for policy in ("sarathi", "vllm"):
        path = tmp_path / f"{policy}.json"
        assert main(["simulate", *SYSTEM, "--rate", "1", "--policy", policy, "--json", str(path)]) == 0
        longest_s[policy] = json.loads(path.read_text())["tbt_s"]["max"]

    assert longest_s["vllm"] > 3 * longest_s["sarathi"]


def test_a_recorded_trace_is_simulated_as_it_arrived(tmp_path: Path):
    trace, path = tmp_path / "trace.csv", tmp_path / "figures.json"
    trace.write_text("num_prefill_tokens,num_decode_tokens,arrived_at\n100,5,3\n200,5,4\n")
    options = ["--trace", str(trace), "--arrivals", "recorded", "--num-requests", "2"]

    assert main(["simulate", *SYSTEM, *options, "--json", str(path)]) == 0

    assert 1 < json.loads(path.read_text())["duration_s"] < 1.5


def test_the_largest_rate_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures.json"
    options = ["--tbt", "0.1", "--first-rate", "4", "--tolerance", "0.2", "--json", str(path)]

    assert main(["capacity", *SYSTEM, *options]) == 0

    figures = json.loads(path.read_text())
    assert f"capacity: {figures['capacity']:.4g} requests/s" in capsys.readouterr().out
    assert figures["best"]["tbt_s"]["p99"] <= 0.1
    assert {trial["is_kept_up"] for trial in figures["trials"]} == {True, False}


@pytest.mark.parametrize("command", [["simulate", "--rate", "1"], ["capacity", "--tbt", "0.1", "--tolerance", "9"]])
def test_figures_that_cannot_be_written_are_told(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*command, *SYSTEM, "--json", str(tmp_path / "none" / "figures.json")]) == 1

    assert "cannot write the figures to" in capsys.readouterr().err


def test_lengths_are_divided(tmp_path: Path):
    path = tmp_path / "figures.json"

    assert main(["simulate", *SYSTEM, "--rate", "1", "--length-divisor", "16", "--json", str(path)]) == 0

    figures = json.loads(path.read_text())
    assert figures["output_token_throughput"] / figures["request_throughput"] < 60  # undivided, some 400


def test_a_target_that_cannot_be_met_gives_no_rate(capsys: pytest.CaptureFixture[str]):
    assert main(["capacity", *SYSTEM, "--tbt", "0.001"]) == 1
    assert "capacity: 0 requests/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "books"], "--lengths is one of .* got 'books'"),
        (["--trace", "/none.csv"], "cannot read the trace /none.csv"),
        (["--model", "no-such-model-7b/x"], "no-such-model-7b"),
        (["--num-blocks", "3"], "3 KV blocks of 16 tokens cannot hold a request of max_model_len=8192"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size must be at least 1, got 0"),
        (["--profiles", "/none"], "/none has neither"),
    ],
)
def test_what_cannot_be_simulated_is_said(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["simulate", *SYSTEM, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("sarathi: ")

    assert re.search(message, error), error
