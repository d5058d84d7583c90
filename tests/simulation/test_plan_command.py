"""`sarathi plan`."""

import json
from pathlib import Path

from rayserve_sarathi.cli import main

PLAN = [
    *("plan", "--model", "mistral-7b", "--hardware", "a100", "--rate", "6", "--tbt", "0.5", "--num-requests", "48"),
    *("--lengths", "800,2000,60,120", "--max-stages", "1", "--token-budgets", "512", "2048"),
]


def test_text_has_the_candidates_the_plan_and_its_deployment_file(capsys):
    assert main(PLAN) == 0

    text = capsys.readouterr().out
    assert "48 requests a run: few requests hide a queue" in text
    assert text.count("<- chosen") == 1
    assert "take 1 replica of TP1-PP1, 1 GPU, token budget 512" in text
    assert "KV cache 26,949 blocks" in text
    assert "model: mistralai/Mistral-7B-v0.1" in text


def test_json_has_what_the_text_has(capsys, tmp_path: Path):
    path = tmp_path / "plan.json"
    assert main([*PLAN, "--json", str(path)]) == 0
    assert "<- chosen" in capsys.readouterr().out
    assert main([*PLAN, "--json"]) == 0
    assert capsys.readouterr().out == path.read_text()

    figures = json.loads(path.read_text())
    plan = figures["plan"]
    assert (plan["num_replicas"], plan["num_gpus"], plan["token_budget"]) == (1, 1, 512)
    assert plan["num_kv_blocks"] == 26_949
    assert plan["predicted"]["tbt_s"]["p99"] == plan["p99_tbt_s"] <= figures["p99_tbt_limit_s"] == 0.5
    assert plan["capacity_per_replica"] >= plan["rate_per_replica"] == 6
    assert plan["deployment"]["args"]["scheduler"]["token_budget"] == 512
    assert {candidate["tensor_parallel_size"] for candidate in figures["candidates"]} == {1, 2, 4}
    assert figures["candidates"][-1]["ruled_out"] == "a replica has 4 GPUs, the best plan has 1"


def test_the_context_is_that_of_the_model_where_it_is_shorter(capsys):
    assert main(["plan", "--model", "yi-34b", *PLAN[3:], "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["max_model_len"] == 4096


def test_where_nothing_keeps_the_target_the_reasons_are_told(capsys):
    assert main([*PLAN, "--tbt", "0.001", "--max-gpus", "3"]) == 1

    text = capsys.readouterr().out
    assert "P99 TBT over 0.001 s with 3 replicas (3 GPUs)" in text
    assert "P99 TBT over 0.001 s with 1 replica (2 GPUs)" in text
    assert "a replica has 4 GPUs, max_gpus is 3" in text
    assert "no plan of up to 3 GPUs keeps that" in text


def test_an_option_that_cannot_be_is_an_error_in_a_line(capsys):
    assert main([*PLAN, "--rate", "-1"]) == 1

    assert capsys.readouterr().err == "sarathi: rate must be a number of requests a second greater than 0, got -1.0\n"
