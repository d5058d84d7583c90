"""The plan with the fewest devices: simulated with few requests, so that figures are right only in their order."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from rayserve_sarathi.config import AppConfig, parse
from rayserve_sarathi.deployment_file import read_deployment
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.gaps import Gaps
from rayserve_sarathi.simulation.plan import Option, Plan, RuledOut, fewest_replicas, make_plan
from rayserve_sarathi.simulation.plan_config import PlanConfig, Target, p90_ttft_s
from rayserve_sarathi.simulation.plan_report import deployment_yaml, render
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.workload import LognormalLengths, make_workload

LENGTHS = LognormalLengths(prompt_median=800, prompt_p90=2000, output_median=60, output_p90=120)
WORKLOAD = make_workload(LENGTHS, num_requests=64, max_total_tokens=4096)
CONFIG = PlanConfig(
    model="yi-34b", hardware="a40", rate=6.0, max_model_len=4096, token_budgets=(256, 1024), max_stages=2, max_gpus=32
)
RELAXED = 1.0


def target(p99_tbt_s: float, *, p90_ttft_s: float | None = None) -> Target:
    return Target(criteria=Criteria(p99_tbt_s=p99_tbt_s), p90_ttft_s=p90_ttft_s)


def num_gpus(plan: Plan) -> int:
    assert plan.chosen is not None
    return plan.chosen.num_gpus


def make_result(*, tbt_s: float = 0.01, delay_s: float = 0.0, ttft_s: float = 0.1) -> SimulationResult:
    one = np.ones(1)
    return SimulationResult(
        arrivals_s=one,
        first_scheduled_s=one + delay_s,
        first_tokens_s=one + ttft_s,
        ends_s=one + 10,
        num_prompt_tokens=np.ones(1, dtype=np.int64),
        num_output_tokens=np.ones(1, dtype=np.int64),
        num_preemptions=np.zeros(1, dtype=np.int64),
        gaps=Gaps(np.array([tbt_s]), np.ones(1, dtype=np.int64)),
        stages=(),
        num_steps=1,
        num_batched_tokens=1,
        duration_s=10.0,
        is_complete=True,
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(CONFIG, WORKLOAD, target(RELAXED))


@pytest.mark.parametrize("needed", range(2, 18))
def test_the_fewest_replicas_that_keep_up_are_found(needed: int):
    tried: list[int] = []

    def run(num_replicas: int) -> SimulationResult:
        tried.append(num_replicas)
        return make_result(tbt_s=needed / num_replicas)

    assert fewest_replicas(run, target(1.0), more_than=1, most=17)[0] == needed
    assert len(tried) <= 5


def test_where_the_most_do_not_keep_up_no_fewer_are_tried():
    tried: list[int] = []

    def run(num_replicas: int) -> SimulationResult:
        tried.append(num_replicas)
        return make_result(delay_s=3.0)

    num_replicas, result = fewest_replicas(run, target(1.0), more_than=0, most=8)
    assert (num_replicas, tried) == (8, [8])
    assert target(1.0).why_missed(result) == "median scheduling delay over 2 s"


def test_a_target_is_missed_by_each_of_its_limits():
    limits = target(0.1, p90_ttft_s=0.5)

    assert limits.are_met(make_result())
    for result, why in [
        (make_result(tbt_s=0.11), "P99 TBT over 0.1 s"),
        (make_result(delay_s=2.1), "median scheduling delay over 2 s"),
        (make_result(ttft_s=0.51), "P90 TTFT over 0.5 s"),
    ]:
        assert not limits.are_met(result)
        assert limits.why_missed(result) == why


def test_the_chosen_plan_keeps_the_target_and_no_option_is_better(plan: Plan):
    chosen = plan.chosen
    assert chosen is not None
    options = [candidate for candidate in plan.candidates if isinstance(candidate, Option)]
    assert chosen.cost == min(option.cost for option in options)
    for option in options:
        assert target(RELAXED).are_met(option.result)
        assert option.rate * option.num_replicas == pytest.approx(CONFIG.rate)
    assert plan.capacity >= chosen.rate


def test_one_replica_less_does_not_keep_up(plan: Plan):
    assert plan.chosen is not None
    assert plan.chosen.num_replicas > 1
    only = replace(CONFIG, max_gpus=num_gpus(plan) - 1)

    assert make_plan(only, WORKLOAD, target(RELAXED)).chosen is None


def test_each_candidate_is_an_option_or_has_its_reason(plan: Plan):
    assert len(plan.candidates) == 1 + 2 * 7
    reasons = {
        (candidate.parallelism.tensor_parallel_size, candidate.parallelism.pipeline_parallel_size): candidate.reason
        for candidate in plan.candidates
        if isinstance(candidate, RuledOut)
    }
    assert reasons[1, 1] == "does not fit: weights 69 GB of 42 GB"
    assert reasons[8, 2] == f"a replica has 16 GPUs, the best plan has {num_gpus(plan)}"


def test_a_stricter_target_never_needs_fewer_devices(plan: Plan):
    assert plan.chosen is not None
    limits = [share * plan.chosen.result.p99_tbt_s for share in (0.4, 0.7, 0.99, 1.5, 3.0)]
    plans = [make_plan(CONFIG, WORKLOAD, target(limit_s)) for limit_s in limits]

    counts = [num_gpus(plan) if plan.chosen is not None else CONFIG.max_gpus + 1 for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_a_higher_rate_never_needs_fewer_devices():
    plans = [make_plan(replace(CONFIG, rate=rate), WORKLOAD, target(RELAXED)) for rate in (1.0, 3.0, 6.0)]

    counts = [num_gpus(plan) for plan in plans]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_limit_on_the_time_to_first_token_is_kept_by_more_devices(plan: Plan):
    assert plan.chosen is not None
    limit_s = p90_ttft_s(plan.chosen.result) / 2
    quick = make_plan(CONFIG, WORKLOAD, target(RELAXED, p90_ttft_s=limit_s))

    assert quick.chosen is not None
    assert p90_ttft_s(quick.chosen.result) <= limit_s
    assert num_gpus(quick) >= num_gpus(plan)


def test_the_same_seed_gives_the_same_plan(plan: Plan):
    again = make_plan(CONFIG, make_workload(LENGTHS, num_requests=64, max_total_tokens=4096), target(RELAXED))

    texts = [render(each, CONFIG, target(RELAXED), num_requests=64) for each in (plan, again)]
    assert texts[0] == texts[1]


def test_a_run_with_hardly_more_requests_than_are_open_at_once_is_not_to_be_trusted(plan: Plan):
    assert plan.chosen is not None
    num_open = plan.chosen.rate * float(plan.chosen.result.latency_s.mean())

    few, many = (render(plan, CONFIG, target(RELAXED), num_requests=round(times * num_open)) for times in (4, 6))
    assert f"(not to be trusted: {num_open:.0f} requests are open at once" in few
    assert "not to be trusted" not in many


def test_the_deployment_file_is_one_that_the_application_takes(plan: Plan, tmp_path: Path):
    assert plan.chosen is not None
    path = tmp_path / "plan.yaml"
    path.write_text(deployment_yaml(plan.chosen, CONFIG, target(RELAXED)))

    (application,) = read_deployment(path)
    assert application.args is not None
    engine = parse(AppConfig, application.args).engine
    assert application.num_pipelines == plan.chosen.num_replicas
    assert (engine.model, engine.max_model_len, engine.dtype) == ("01-ai/Yi-34B", 4096, "bfloat16")
    assert engine.tensor_parallel_size == plan.chosen.parallelism.tensor_parallel_size
    assert engine.pipeline_parallel_size == plan.chosen.parallelism.pipeline_parallel_size
    assert engine.scheduler.token_budget == plan.chosen.token_budget
    assert engine.slo.tbt_s == RELAXED
    assert not engine.hf_overrides


def test_a_budget_of_auto_keeps_targets_for_which_a_fixed_one_needs_more_devices():
    limits = target(0.3)
    fixed = make_plan(replace(CONFIG, token_budgets=(256, 1024)), WORKLOAD, limits)
    config = replace(CONFIG, token_budgets=(256, 1024, "auto"))
    plan = make_plan(config, WORKLOAD, limits)

    assert plan.chosen is not None
    assert plan.chosen.token_budget == "auto"
    assert num_gpus(plan) < num_gpus(fixed)
    assert limits.are_met(plan.chosen.result)
    text = render(plan, config, limits, num_requests=64)
    assert re.search(r"^ +1 +2 +auto .*<- chosen$", text, re.M)
    settings = yaml.safe_load(deployment_yaml(plan.chosen, config, limits))["applications"][0]["args"]
    assert (settings["scheduler"]["token_budget"], settings["slo"]) == ("auto", {"tbt_s": 0.3})


def test_more_tokens_than_the_model_has_positions_are_overridden_in_the_file(plan: Plan):
    assert plan.chosen is not None
    text = deployment_yaml(plan.chosen, replace(CONFIG, max_model_len=8192), target(RELAXED))

    assert "hf_overrides:\n      max_position_embeddings: 8192\n" in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rate": 0.0}, "rate must be a number of requests a second greater than 0, got 0"),
        ({"max_gpus": 0}, "max_gpus must be at least 1, got 0"),
        ({"token_budgets": ()}, r"token_budgets must be numbers of at least 1 or auto, got \[\]"),
        ({"token_budgets": (0, "auto")}, r"token_budgets must be numbers of at least 1 or auto, got \[0, 'auto'\]"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be greater than 0 and at most 1, got 1.5"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(change: dict[str, float], problem: str):
    with pytest.raises(ConfigError, match=problem):
        replace(CONFIG, **change)
