"""The figures of simulated runs show what the policies differ in."""

from itertools import pairwise

import numpy as np
import pytest

from rayserve_sarathi.simulation.figures.bubbles import bubbles
from rayserve_sarathi.simulation.figures.capacities import capacity, capacity_bars, capacity_curves
from rayserve_sarathi.simulation.figures.machine import Machine
from rayserve_sarathi.simulation.figures.session import pipeline_machine, pipeline_workload
from rayserve_sarathi.simulation.figures.stalls import stalls
from tests.simulation.figures.machines import YI, YI_PIPELINE, make_experiment


@pytest.fixture(scope="module")
def stall_series():
    experiment = make_experiment(YI)
    return stalls(experiment, num_requests=32, rate=experiment.full_rate(512) / 2, token_budget=512)


@pytest.fixture(scope="module")
def bubble_series():
    experiment = make_experiment(YI_PIPELINE)
    return bubbles(experiment, pipeline_workload(experiment, 512), token_budget=512)


def test_the_longest_gap_of_sarathi_is_far_below_that_of_vllm(stall_series):
    vllm, sarathi = (stall_series.timelines[policy] for policy in ("vllm", "sarathi"))

    assert vllm.max_s > 1.0, "a stall that people see"
    assert sarathi.max_s < vllm.max_s / 4
    assert sarathi.p99_s < vllm.p99_s / 2
    assert (vllm.max_s, sarathi.max_s) == pytest.approx((max(vllm.gaps_s), max(sarathi.gaps_s)), abs=1e-6)


def test_the_followed_request_is_the_one_with_the_longest_gap_and_gets_as_many_tokens_under_both(stall_series):
    vllm, sarathi = (stall_series.timelines[policy] for policy in ("vllm", "sarathi"))

    assert np.diff(vllm.followed_times_s).max() == pytest.approx(vllm.max_s)
    assert len(vllm.followed_times_s) == len(sarathi.followed_times_s)


def test_gaps_that_are_alike_are_there_once(stall_series):
    for timeline in stall_series.timelines.values():
        points = list(zip(timeline.times_s, timeline.gaps_s, strict=True))
        assert len(set(points)) == len(points)
        assert list(timeline.times_s) == sorted(timeline.times_s)


def test_sarathi_has_fewer_bubbles_than_orca_and_ends_first(bubble_series):
    timelines = bubble_series.timelines

    assert timelines["sarathi"].bubble_share < timelines["orca"].bubble_share / 2
    assert timelines["orca"].bubble_share < timelines["faster_transformer"].bubble_share
    assert min(timelines, key=lambda policy: timelines[policy].duration_s) == "sarathi"


def test_bars_of_a_stage_never_overlap_and_hold_all_tokens(bubble_series):
    num_tokens = sum(bubble_series.num_prompt_tokens) + sum(bubble_series.num_output_tokens)
    for timeline in bubble_series.timelines.values():
        for stage in range(2):
            bars = sorted((bar for bar in timeline.bars if bar.stage == stage), key=lambda bar: bar.start_s)
            assert all(before.end_s <= bar.start_s + 1e-9 for before, bar in pairwise(bars))
            # The last token of each request is never an input.
            assert sum(bar.num_tokens for bar in bars) == num_tokens - len(bubble_series.num_prompt_tokens)


def test_policies_differ_in_what_shares_a_step(bubble_series):
    kinds = {policy: {bar.kind for bar in each.bars} for policy, each in bubble_series.timelines.items()}

    assert "mixed" in kinds["sarathi"] & kinds["orca"] & kinds["hybrid_only"]
    assert kinds["vllm"] == kinds["faster_transformer"] == kinds["chunked_only"] == {"prefill", "decode"}


def test_a_machine_of_one_stage_gets_two_for_its_bubbles():
    assert pipeline_machine(YI) == YI_PIPELINE
    assert pipeline_machine(YI_PIPELINE) == YI_PIPELINE


def test_sarathi_leads_under_the_strict_target_and_less_under_the_relaxed():
    series = capacity_bars(make_experiment(YI), num_requests=48, policies=("orca", "vllm", "sarathi"))

    strict, relaxed = series.rates["strict"], series.rates["relaxed"]
    assert series.tbt_s["relaxed"] == pytest.approx(5 * series.tbt_s["strict"])
    assert strict["sarathi"] > 1.5 * max(strict["vllm"], strict["orca"])
    assert strict["sarathi"] / strict["vllm"] > relaxed["sarathi"] / relaxed["vllm"]


def test_a_laxer_target_allows_more():
    series = capacity_curves(make_experiment(YI), num_requests=32, budgets=(512,), multiples=(5.0, 25.0))

    assert list(series.rates) == ["orca", "vllm", "sarathi, budget 512"]
    for rates in series.rates.values():
        assert 0 < rates[0] <= rates[1]
    assert series.rates["sarathi, budget 512"][0] > series.rates["vllm"][0]


def test_a_budget_of_auto_keeps_a_target_that_is_too_tight_for_a_fixed_one():
    series = capacity_curves(make_experiment(YI), num_requests=16, budgets=(2048,), multiples=(5.0,), has_auto=True)

    assert series.rates["sarathi, budget auto"][0] > 1.5 * series.rates["sarathi, budget 2048"][0]


def test_few_requests_do_not_hide_a_queue_that_grows_on_a_fast_machine():
    experiment = make_experiment(Machine(model="llama3-8b", hardware="h100"))

    few, many = (
        capacity(experiment, "vllm", token_budget=512, tbt_s=10.0, num_requests=num_requests)
        for num_requests in (8, 512)
    )
    assert few == pytest.approx(many, rel=0.2)


def test_both_figures_give_a_policy_without_a_budget_the_same_capacity():
    experiment = make_experiment(YI)
    bars = capacity_bars(experiment, num_requests=24, policies=("vllm",))
    curves = capacity_curves(experiment, num_requests=24, budgets=(512,), multiples=(5.0, 25.0))

    assert curves.tbt_s == tuple(bars.tbt_s.values())
    assert curves.rates["vllm"] == tuple(rates["vllm"] for rates in bars.rates.values())


def test_no_capacity_is_above_the_rate_of_full_steps():
    experiment = make_experiment(YI)
    run = experiment.run(experiment.workload(64, 1000.0), "sarathi", token_budget=512)

    assert run.num_requests / run.duration_s < experiment.full_rate(512)
