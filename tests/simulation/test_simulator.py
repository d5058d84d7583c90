"""The simulator does what the engine would, step by step, though it takes steps that are alike together."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayserve_sarathi.config import SchedulerConfig
from rayserve_sarathi.errors import ConfigError, ContextLengthError
from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.metrics import Histogram, SchedulerMetrics
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.scheduling.sarathi import SarathiScheduler
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.simulator import make_simulated_scheduler, simulate
from rayserve_sarathi.simulation.virtual_pipeline import ModelledPipeline
from rayserve_sarathi.simulation.workload import SHAREGPT_LENGTHS, make_workload
from tests.simulation.models import LinearTimes, PlainRun, make_workload_of

NUM_SLOTS = 96

cases = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4, 16]),
        "token_budget": st.integers(1, 24),
        "max_num_seqs": st.integers(1, 8),
        "max_num_partial_prefills": st.integers(1, 2),
        "watermark": st.sampled_from([0.0, 0.1]),
        "num_stages": st.sampled_from([1, 1, 2, 3]),
        "enable_prefix_caching": st.sampled_from([False, False, False, True]),
        "gap_s": st.sampled_from([0.0, 0.004, 0.05]),
        "requests": st.lists(
            st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=14
        ),
    }
)


def counts_of(metrics: SchedulerMetrics) -> dict[str, object]:
    values = {field.name: getattr(metrics, field.name) for field in fields(metrics)}
    return {
        name: (value.buckets(), value.sum) if isinstance(value, Histogram) else value for name, value in values.items()
    }


@pytest.mark.parametrize("policy", sorted(SCHEDULERS))
@given(case=cases)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_time_is_that_of_the_plain_run(policy: str, case: dict):
    case = dict(case)
    gap_s, block_size, num_stages = case.pop("gap_s"), case.pop("block_size"), case.pop("num_stages")
    caching, requests = case.pop("enable_prefix_caching"), case.pop("requests")
    arrivals_s = np.cumsum([num_gaps * gap_s for num_gaps, _, _ in requests])
    workload = make_workload_of(
        *[(arrival_s, prompt, output) for arrival_s, (_, prompt, output) in zip(arrivals_s, requests, strict=True)]
    )
    plain_scheduler, scheduler = (
        make_simulated_scheduler(
            SchedulerConfig(policy=policy, **case),
            num_blocks=-(-NUM_SLOTS // block_size),
            block_size=block_size,
            max_model_len=NUM_SLOTS,
            num_stages=num_stages,
            enable_prefix_caching=caching,
        )
        for _ in range(2)
    )
    plain = PlainRun()
    plain.run(workload, plain_scheduler, ModelledPipeline(LinearTimes(num_stages)))

    result = simulate(workload, scheduler, ModelledPipeline(LinearTimes(num_stages)), keeps_token_times=True)

    assert result.is_complete
    assert result.num_steps == len(plain.steps)
    assert result.num_batched_tokens == sum(step.num_tokens for step in plain.steps)
    for index in range(len(requests)):
        assert result.token_times_s[index].tolist() == plain.token_times_s[index]
        assert result.first_tokens_s[index] == plain.token_times_s[index][0]
        assert result.ends_s[index] == plain.token_times_s[index][-1]
        assert result.first_scheduled_s[index] == plain.first_scheduled_s[index]
        assert result.num_preemptions[index] == plain.num_preemptions[index]
    assert np.repeat(result.gaps.values, result.gaps.counts).tolist() == sorted(plain.gaps_s)
    assert counts_of(scheduler.metrics) == counts_of(plain_scheduler.metrics)
    scheduler.check_integrity()


class CountingScheduler(SarathiScheduler):
    num_choices = 0

    def choose(self):
        self.num_choices += 1
        return super().choose()


def test_steps_that_are_alike_are_chosen_once():
    blocks = BlockManager(200, block_size=16, enable_prefix_caching=False)
    scheduler = CountingScheduler(SchedulerConfig(token_budget=64), blocks, max_model_len=3000, vocab_size=1)

    result = simulate(make_workload_of((0.0, 1000, 500)), scheduler, ModelledPipeline(LinearTimes()))

    assert result.num_steps == 16 + 499
    assert scheduler.num_choices == 4  # full chunks, the last chunk, decodes, and nothing left


def test_a_run_is_given_up_only_when_it_fails_anyway():
    workload = make_workload(SHAREGPT_LENGTHS, num_requests=60, max_total_tokens=8192, seed=3)

    def run(rate: float, tbt_s: float, give_up: bool):
        scheduler = make_simulated_scheduler(
            SchedulerConfig(token_budget=512, max_num_seqs=16),
            num_blocks=4000,
            block_size=16,
            max_model_len=8192,
            num_stages=1,
        )
        criteria = Criteria(p99_tbt_s=tbt_s)
        result = simulate(
            workload.at_rate(rate), scheduler, ModelledPipeline(LinearTimes()), give_up=criteria if give_up else None
        )
        return criteria.are_met(result), result

    verdicts = set()
    for rate in (0.5, 1.0, 1.5, 2.0, 4.0, 50.0):
        for tbt_s in (0.01, 0.0375, 0.04, 0.1):
            (verdict, early), (full_verdict, full) = (run(rate, tbt_s, give_up) for give_up in (True, False))
            assert verdict == full_verdict
            assert full.is_complete
            verdicts.add((verdict, early.is_complete))
    assert verdicts >= {(True, True), (False, False)}


def test_stage_time_is_busy_or_bubble():
    scheduler = make_simulated_scheduler(
        SchedulerConfig(token_budget=10), num_blocks=50, block_size=4, max_model_len=100, num_stages=2
    )
    times = LinearTimes(2, base_s=1.0, token_s=0.0, context_s=0.0, transfer=0.25, cpu=0.5)

    result = simulate(make_workload_of((5.0, 10, 2)), scheduler, ModelledPipeline(times))

    # Two steps, one after the other: 0.5 of preparation, 1 and 2 in the stages, 0.25 between them.
    assert result.ttft_s.tolist() == [3.75]
    assert result.duration_s == 7.5
    assert [(stage.busy_s, stage.bubble_s) for stage in result.stages] == [(2.0, 5.5), (4.0, 3.5)]
    assert result.stages[0].bubble_share == pytest.approx(5.5 / 7.5)


def test_what_can_never_run_is_refused():
    with pytest.raises(ConfigError, match="2 KV blocks of 4 tokens cannot hold"):
        make_simulated_scheduler(SchedulerConfig(), num_blocks=2, block_size=4, max_model_len=9, num_stages=1)
    scheduler = make_simulated_scheduler(SchedulerConfig(), num_blocks=4, block_size=4, max_model_len=16, num_stages=1)
    with pytest.raises(ContextLengthError, match="maximum context length is 16"):
        simulate(make_workload_of((0.0, 10, 7)), scheduler, ModelledPipeline(LinearTimes()))
